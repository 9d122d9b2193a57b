"""A sweep by the version whose tasks had the settings of sampler and cache among their fields.

`stored_sweep` is what that version wrote for `arithmetic_model`, with the tasks
plain: EvalTask(limit=3)
blocks: gen_length=4, block_length=2, steps=2, threshold=0.5, temperature=0.5, stop_at_eos=True,
  cache="dual", until=("[PAD]",)
early: gen_length=4, block_length=4, steps=4, cache="prefix"
dream: sampler="dream", alg="maskgit_plus", temperature=0.1, top_p=0.9, gen_length=4
guided: cfg_scale=0.5, gen_length=2
nelbo: num_samples=2, cfg_scale=0.5
and EvalConfig(static=(1,), random=(1,), num_calibration=2, batch_size=2).
"""

import dataclasses
import json
from pathlib import Path

import pytest

from dials_jax.caching.early_skip.settings import EarlySkip
from dials_jax.caching.plain import DualCache, PrefixCache
from dials_jax.config import ArithmeticData
from dials_jax.evaluation import sweep
from dials_jax.evaluation.items import item_names
from dials_jax.evaluation.older_sweeps import complete_generation, read_task
from dials_jax.evaluation.scoring import TaskScores
from dials_jax.evaluation.tally import LayerCounts
from dials_jax.evaluation.task import EvalConfig, EvalTask
from dials_jax.loading import load
from dials_jax.reporting import sweep_report
from dials_jax.sampling.confidence import Confidence
from dials_jax.sampling.dream import Dream
from dials_jax.skipping.flops import Flops

STORED = Path(__file__).parent / "stored_sweep"
DATA = ArithmeticData(operations=("max",))
SAMPLERS = {
    "plain": {},
    "blocks": {
        "sampler": Confidence(
            4, block_length=2, steps=2, threshold=0.5, temperature=0.5, stop_at_eos=True
        ),
        "cache": DualCache(),
        "until": ("[PAD]",),
    },
    "early": {"sampler": Confidence(4), "cache": PrefixCache()},
    "dream": {"sampler": Dream(4, alg="maskgit_plus", temperature=0.1, top_p=0.9)},
    "guided": {"sampler": Confidence(2, cfg_scale=0.5)},
}
TASKS = (
    *(
        EvalTask(name=name, metric="exact_match", data=DATA, limit=3, **settings)
        for name, settings in SAMPLERS.items()
    ),
    EvalTask(name="nelbo", metric="nelbo", data=DATA, limit=3, num_samples=2, cfg_scale=0.5),
)


@pytest.fixture
def cfg(arithmetic_model, monkeypatch):
    monkeypatch.setattr(sweep_report, "_figures", lambda *args: [])
    return EvalConfig(
        model=str(arithmetic_model),
        tasks=TASKS,
        num_static=(1,),
        num_random=(1,),
        num_calibration=2,
        batch_size=2,
    )


@pytest.fixture
def copied(arithmetic_model, tmp_path):
    """Copies stored files; their weights are the model's, in whatever way it drew them."""
    weights, now = stored_results()["model"]["fingerprint"], load(arithmetic_model).fingerprint

    def copy(*names):
        for name in names:
            (tmp_path / name).write_text((STORED / name).read_text().replace(weights, now))
        return tmp_path

    return copy


def stored_results():
    return json.loads((STORED / "results.json").read_text())


def assert_same_runs(results, stored, recounted=()):
    found, expected = (
        {(run["task"], run["policy"]["label"]): run for run in runs} for runs in (results, stored)
    )
    assert found.keys() == expected.keys()
    for key, run in found.items():
        assert run["items"] == pytest.approx(expected[key]["items"], rel=1e-5)
        for name in ("metric", "cache", "policy", "examples", "also"):
            assert run[name] == expected[key][name]
        assert run["execution"] == expected[key]["execution"] or key[0] in recounted
        # Settings that are newer have their defaults.
        generations = run["generation"], expected[key]["generation"]
        assert complete_generation(generations[0]) == complete_generation(generations[1])


@pytest.mark.parametrize("names", [("sweep.json", "runs.jsonl"), ("results.json",)])
def test_what_it_scored_is_not_scored_again(names, cfg, copied, monkeypatch):
    monkeypatch.setattr(sweep, "score_task", None)
    workdir = copied(*names)
    results = sweep.sweep(cfg, workdir)
    assert_same_runs(results["runs"], stored_results()["runs"])
    sweep.sweep(cfg, workdir)  # what is written now is read, too


def test_what_it_had_not_finished_gets_the_same_scores(cfg, copied):
    """Of every task the full model's first batch is there, and nothing of the other policies."""
    lines = (STORED / "runs.jsonl").read_text().splitlines(keepends=True)
    kept, seen = [], set()
    for line in lines:
        record = json.loads(line)
        if "scores" in record and record["policy"]["kind"] == "full":
            if record["task"] in seen:
                continue
            seen.add(record["task"])
        elif "scores" in record or "run" in record:
            continue
        kept.append(line)
    workdir = copied("sweep.json")
    (workdir / "runs.jsonl").write_text("".join(kept))
    results = sweep.sweep(dataclasses.replace(cfg, num_random=(), num_static=()), workdir)
    full = [run for run in stored_results()["runs"] if run["policy"]["kind"] == "full"]
    # A call in which a sequence proposed nothing but [MASK] did not count as its own then.
    assert_same_runs(results["runs"], full, recounted=("blocks",))


@pytest.mark.parametrize("names", [("sweep.json", "runs.jsonl"), ("results.json",)])
@pytest.mark.parametrize(
    ("task", "changes", "title"),
    [
        ("plain", {"sampler": Confidence(3, steps=1)}, "plain, steps 1"),
        ("dream", {"sampler": Dream(4, alg="maskgit_plus")}, "dream, temperature 0.0, top_p None"),
        ("early", {"cache": None}, "early, cache none"),
        ("nelbo", {"cfg_scale": 0.0}, "nelbo, cfg_scale 0.0"),
    ],
)
def test_other_settings_are_scored_beside_what_it_scored(
    names, task, changes, title, cfg, copied, monkeypatch
):
    workdir = copied(*names)
    asked = []
    monkeypatch.setattr(sweep, "score_task", scores_of_nothing(asked))
    changed = [dataclasses.replace(t, **changes) for t in cfg.tasks if t.name == task]
    cfg = dataclasses.replace(cfg, tasks=tuple(changed), num_random=(), num_static=())
    results = sweep.sweep(cfg, workdir)
    assert asked == [[]]  # it starts without a record
    assert results["runs"][0]["task"] == title
    assert_same_runs(results["runs"][1:], stored_results()["runs"])


def test_another_seed_and_more_routers_are_no_contradiction(cfg, copied, monkeypatch):
    workdir, asked = copied("sweep.json", "runs.jsonl"), []
    monkeypatch.setattr(sweep, "score_task", scores_of_nothing(asked))
    cfg = dataclasses.replace(cfg, seed=1, tasks=cfg.tasks[:1], num_random=(), num_static=())
    results = sweep.sweep(cfg, workdir)
    plain = [run for run in results["runs"] if run["task"] == "plain"]
    assert [run["seed"] for run in plain] == [0, 1, 0, 0] and asked == [[]]


def scores_of_nothing(asked):
    """Stands for `score_task`: notes the records that it is given."""

    def score_task(model, task, items, *args, records, **kwargs):
        asked.append(records)
        flops = Flops(1.0, 1.0, 1.0, 1.0)
        scores = dict.fromkeys(item_names(items), 0.0)
        return TaskScores(LayerCounts(model.num_layers), flops, scores, {}, [], {}, 0)

    return score_task


def test_tasks_of_any_version_are_read():
    stored = stored_results()["config"]["tasks"]
    tasks = tuple(read_task(task, answer_length=3) for task in stored)
    plain = dataclasses.replace(TASKS[0], sampler=Confidence(3))
    assert tasks == (plain, *TASKS[1:])
    old = {**stored[1], "cache": "es-8-2"}
    assert read_task(old, None).cache == EarlySkip(prompt_every=8, block_every=2)
