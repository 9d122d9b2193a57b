"""Sweeps with every family's own sampler, on the small models of their authors' code."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from dials_jax.caching.early_skip.settings import EarlySkip
from dials_jax.caching.plain import DualCache
from dials_jax.config import TaskData
from dials_jax.data.tokenizer import character_tokenizer, load_tokenizer
from dials_jax.errors import InputError
from dials_jax.evaluation import sweep
from dials_jax.evaluation.scoring import item_keys
from dials_jax.evaluation.task import EvalConfig, EvalTask
from dials_jax.loading import load
from dials_jax.reporting import sweep_report
from dials_jax.sampling.ancestral import Ancestral
from dials_jax.sampling.autoregressive import Autoregressive
from dials_jax.sampling.confidence import Confidence
from dials_jax.sampling.dream import Dream
from dials_jax.sampling.generate import generate
from dials_jax.skipping.policies import Random, Static

pytestmark = pytest.mark.usefixtures("without_plots")
GOLDEN = Path(__file__).parents[1] / "golden"
CHARACTERS = "".join(map(chr, [*range(32, 127), *range(161, 561)]))
NUM_CHARACTERS = {"dream_tiny": 297, "mdlm_tiny": 94, "qwen2_tiny": 298}
RECORDS = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "20+3=", "answer": "23"}]
CASES = {
    "dream_tiny": (Dream(6, 3, alg="maskgit_plus", temperature=0.5, top_p=0.9), DualCache()),
    "mdlm_tiny": (Ancestral(6, 4), None),
    "qwen2_tiny": (Autoregressive(6), None),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Makes a folder with one of the models, its tokenizer and the records."""
    monkeypatch.setattr(sweep_report, "_figures", lambda *args: [])

    def make(name):
        folder = tmp_path / name
        shutil.copytree(GOLDEN / name, folder, ignore=shutil.ignore_patterns("*.npz", "*.ckpt"))
        character_tokenizer(CHARACTERS[: NUM_CHARACTERS[name]]).save(folder)
        lines = "".join(json.dumps(record) + "\n" for record in RECORDS)
        (folder / "records.jsonl").write_text(lines)
        return folder

    return make


def config(folder, **changes):
    data = TaskData(paths=(str(folder / "records.jsonl"),), prompt_length=8, answer_length=4)
    task = EvalTask(name="sums", metric="exact_match", data=data, **changes.pop("task"))
    values = {"num_static": (1,), "num_random": (1,), "batch_size": 2}
    return EvalConfig(model=str(folder), tasks=(task,), **(values | changes))


@pytest.mark.parametrize("name", CASES)
def test_a_sweep_takes_the_familys_own_sampler(name, folder, tmp_path):
    sampler, cache = CASES[name]
    path, causal = folder(name), isinstance(sampler, Autoregressive)
    cfg = config(path, task={"sampler": sampler, "cache": cache}, num_random=() if causal else (1,))
    results = sweep.sweep(cfg, tmp_path / "sweep")
    assert {run["generation"]["sampler"] for run in results["runs"]} == {
        type(sampler).__name__.lower()
    }
    model, tokenizer = load(path), load_tokenizer(path)
    items = sweep.load_items(cfg.tasks[0], tokenizer, model.config)
    for run in results["runs"]:
        kind, layers = run["policy"]["kind"], run["policy"].get("layers")
        policy = {"full": None, "static": Static(layers or ()), "random": Random(1)}[kind]
        for item, example in zip(items, run["examples"], strict=True):
            key = item_keys(0, [item])
            prompt = np.array([item.prompt])
            out = generate(model, prompt, sampler=sampler, policy=policy, cache=cache, key=key)
            answer = out.tokens[0, len(item.prompt) :].tolist()
            ends = [i for i, token in enumerate(answer) if token == model.config.eos_id]
            assert example["output"] == tokenizer.decode(answer[: ends[0]] if ends else answer)
        if cache is None:  # a call that fills a cache runs all layers
            assert run["flops"]["layers_run"] == 1 - (kind != "full") / model.num_layers
    page = (tmp_path / "sweep" / "report.html").read_text()
    assert f"sampler {type(sampler).__name__.lower()}" in page


@pytest.mark.parametrize(
    ("name", "task", "message"),
    [
        ("qwen2_tiny", {"sampler": Autoregressive(4)}, "sums', random k=1: Autoregressive skips"),
        ("qwen2_tiny", {"sampler": Confidence(4)}, "a causal model .* fills in no .MASK."),
        ("mdlm_tiny", {"sampler": Ancestral(4, 4), "cache": DualCache()}, "Ancestral reveals tok"),
        ("mdlm_tiny", {"sampler": Autoregressive(4)}, "Autoregressive is for causal models"),
        (
            "dream_tiny",
            {"sampler": Dream(4), "cache": EarlySkip(prompt_every=4)},
            "EarlySkip weighs confidence against change",
        ),
    ],
)
def test_what_does_not_compose_is_refused_before_the_first_run(
    name, task, message, folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(sweep, "score_task", None)
    with pytest.raises(InputError, match=message) as error:
        sweep.sweep(config(folder(name), task=task), tmp_path / "sweep")
    assert "\n" not in str(error.value)


def test_every_setting_of_a_cache_reaches_the_results(folder, tmp_path):
    cache = EarlySkip((1.0, 0.5), (0.0, 0.4), alpha=0.3, prompt_every=4, block_every=2)
    cfg = config(folder("dream_tiny"), task={"sampler": Confidence(4), "cache": cache})
    with pytest.warns(UserWarning, match="LLaDA's rules"):
        run = sweep.sweep(cfg, tmp_path / "sweep")["runs"][0]
    others = "proportions (1.0, 0.5), depths (0.0, 0.4), alpha 0.3"
    assert run["cache"] == run["generation"]["cache"] == f"es-4-2, {others}"
