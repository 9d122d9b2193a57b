"""Static policies against full depth: retention, equal outputs and KL, on the authors' models."""

import csv
import dataclasses
import json
import shutil
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from dials_jax.config import EvalConfig, EvalTask, TaskData
from dials_jax.data.tokenizer import character_tokenizer, load_tokenizer
from dials_jax.errors import InputError
from dials_jax.evaluation import batched, full_depth, sweep
from dials_jax.evaluation.full_depth import NUM_COPIES
from dials_jax.evaluation.items import item_names, load_items
from dials_jax.evaluation.likelihood import draw_masked
from dials_jax.evaluation.scoring import item_keys
from dials_jax.reporting import sweep_report
from dials_jax.reporting.sweep_rows import compute_sweep_rows
from dials_jax.sampling.autoregressive import Autoregressive
from dials_jax.sampling.confidence import Confidence
from dials_jax.sampling.dream import Dream
from dials_jax.skipping.policies import Static
from dials_jax.statistics import paired_test
from tests.convert.test_qwen2 import GOLDEN

CHARACTERS = "".join(map(chr, [*range(33, 127), *range(161, 561)]))
# Of the tokenizer, whose special tokens come before and after its characters.
NUM_CHARACTERS = {"llada_tiny": 317, "dream_tiny": 297, "qwen2_tiny": 298}
LENGTH = 6
SAMPLERS = {
    "llada_tiny": Confidence(LENGTH, steps=3),
    "dream_tiny": Dream(LENGTH, 3, alg="maskgit_plus", temperature=0.0),
    "qwen2_tiny": Autoregressive(LENGTH),
}
PROMPTS = ["1+1=", "20+3=", "7", "300+4="]


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Models are read once, and no figures are drawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "load", cache(sweep.load))
        patch.setattr(sweep_report, "_figures", lambda *args: [])
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """`config(name)`: a sweep in which the model's own outputs, but the last, are right."""

    def make(name):
        folder = tmp_path_factory.mktemp(name) / name
        shutil.copytree(GOLDEN / name, folder, ignore=shutil.ignore_patterns("*.npz"))
        character_tokenizer(CHARACTERS[: NUM_CHARACTERS[name]]).save(folder)
        model, tokenizer = sweep.load(str(folder)), load_tokenizer(folder)
        prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
        sampler, batch_size = SAMPLERS[name], 8
        found = batched.generate_all(model, prompts, sampler=sampler, batch_size=batch_size)
        answers = [*(tokenizer.decode(ids.tolist()) for ids in found[:-1]), "none"]
        records = zip(PROMPTS, answers, strict=True)
        lines = [json.dumps({"prompt": prompt, "answer": answer}) for prompt, answer in records]
        (folder / "records.jsonl").write_text("\n".join(lines))
        data = TaskData(
            paths=(str(folder / "records.jsonl"),), prompt_length=8, answer_length=LENGTH
        )
        task = EvalTask(name="sums", metric="exact_match", data=data, sampler=sampler)
        return EvalConfig(
            model=str(folder), tasks=(task,), num_static=(1, 2), num_random=(),
            batch_size=batch_size,
        )  # fmt: skip

    return make


@pytest.fixture(scope="module", params=SAMPLERS)
def grown(request, config, tmp_path_factory):
    """A sweep without neighbours, continued with both kinds and the KL: its configuration, both
    results and how many batches the second call generated."""
    cfg, workdir = config(request.param), tmp_path_factory.mktemp("sweep") / request.param
    first = sweep.sweep(cfg, workdir)
    both = dataclasses.replace(cfg, allow_adjacent=(False, True), kl_items=3)
    batches = []
    with pytest.MonkeyPatch.context() as patch:
        generate = batched.generate
        counted = lambda *args, **kwargs: batches.append(1) or generate(*args, **kwargs)  # noqa: E731
        patch.setattr(batched, "generate", counted)
        second = sweep.sweep(both, workdir)
    return both, workdir, first, second, len(batches)


def by_label(results):
    return {run["policy"]["label"]: run for run in results["runs"]}


def outputs_of(workdir):
    """Stored outputs by the layers that were skipped."""
    found = {}
    for line in (workdir / "runs.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "outputs" in record:
            layers = tuple(record["policy"].get("layers", ()))
            found.setdefault(layers, {}).update(record["outputs"])
    return found


def test_both_kinds_stand_in_one_sweep_and_nothing_runs_twice(grown):
    _, workdir, first, second, num_batches = grown
    labels = ["full", "static k=1", "static k=1 adjacent", "static k=2", "static k=2 adjacent"]
    runs = by_label(second)
    assert list(runs) == labels
    assert list(by_label(first)) == [x for x in labels if "adjacent" not in x]
    for label, run in by_label(first).items():
        assert runs[label]["items"] == run["items"] and runs[label]["policy"] == run["policy"]
    sets = {label: tuple(run["policy"].get("layers", ())) for label, run in runs.items()}
    assert sets["static k=1"] == sets["static k=1 adjacent"]
    assert np.diff(sets["static k=2"]) > 1
    known = {sets[label] for label in by_label(first)}
    assert num_batches == len(set(sets.values()) - known) <= 1
    assert set(outputs_of(workdir)) == set(sets.values())


def test_layers_are_those_of_the_similarities_and_prompts_choose_for_themselves(grown):
    _, workdir, _, results, _ = grown
    (found,) = results["static_choice"].values()
    lines = map(json.loads, (workdir / "runs.jsonl").read_text().splitlines())
    (record,) = [line for line in lines if "similarities" in line]
    by_prompt = np.array(record["by_prompt"])
    np.testing.assert_allclose(found["similarities"], by_prompt.mean(axis=0), rtol=1e-12)
    assert found["num_prompts"] == len(by_prompt) == len(PROMPTS)
    order = np.argsort(-by_prompt.mean(axis=0))
    assert by_label(results)["static k=2 adjacent"]["policy"]["layers"] == sorted(order[:2])
    largest = np.argsort(-by_prompt, axis=1)[:, :2]
    counts = np.bincount(largest.ravel(), minlength=by_prompt.shape[1])
    np.testing.assert_allclose(found["shares"]["static k=2 adjacent"], counts / len(by_prompt))
    assert sum(found["shares"]["static k=1"]) == 1


def test_retention_and_equal_outputs_by_hand(grown):
    _, workdir, _, results, _ = grown
    outputs, runs = outputs_of(workdir), by_label(results)
    full = np.array(list(runs["full"]["items"].values()))
    assert full.sum() == len(PROMPTS) - 1
    rows = {row.policy: row for row in compute_sweep_rows(results)}
    assert rows["full"].retention is None and rows["full"].equivalence is None
    for label, run in runs.items():
        if label == "full":
            continue
        own, row = np.array([run["items"][name] for name in runs["full"]["items"]]), rows[label]
        ratio = own.mean() / full.mean()
        stderr = (own - ratio * full).std(ddof=1) / 2 / full.mean()
        assert row.retention == pytest.approx(ratio)
        half = scipy.stats.t.ppf(0.975, 3) * stderr
        assert row.retention_high == pytest.approx(ratio + half)
        same = [outputs[tuple(run["policy"]["layers"])][x] == outputs[()][x] for x in outputs[()]]
        assert row.equivalence == np.mean(same) == np.mean(list(run["identical"].values()))
        assert row.equivalence_low <= row.equivalence <= row.equivalence_high
        assert row.p_value == paired_test(run["items"], runs["full"]["items"]).p_value
        assert row.adjacent == label.endswith("adjacent")


def kl_by_hand(model, key, prompt, answer, layers, longest):
    """The mean over copies of the mean KL over predicted tokens, one sequence at a time."""
    cfg, values = model.config, []
    tokens = np.array([[*prompt, *answer]])
    log_probs = [
        lambda x, p=policy: scipy.special.log_softmax(
            np.asarray(model.apply(x, policy=p).logits[0], np.float64), axis=-1
        )
        for policy in (None, Static(layers))
    ]
    if cfg.causal:
        full, own = (f(tokens)[len(prompt) - 1 : -1] for f in log_probs)
        return (np.exp(full) * (full - own)).sum(axis=-1).mean()
    for copy in range(NUM_COPIES):
        in_answer = jnp.arange(longest) >= longest - len(answer)
        masked = draw_masked(jax.random.split(key)[0], jnp.array(copy), in_answer, NUM_COPIES)
        masked = np.asarray(masked)[longest - len(answer) :]
        shown = tokens.copy()
        shown[0, len(prompt) :][masked] = cfg.mask_id
        full, own = (f(shown)[len(prompt) :][masked] for f in log_probs)
        values.append((np.exp(full) * (full - own)).sum(axis=-1).mean())
    return np.mean(values)


def test_kl_by_hand_on_the_full_models_own_outputs(grown):
    cfg, workdir, _, results, _ = grown
    model = sweep.load(cfg.model)
    items = load_items(cfg.tasks[0], load_tokenizer(cfg.model), model.config)
    full, eos = outputs_of(workdir)[()], model.config.eos_id
    texts = {
        name: [*full[name], *[eos] * (eos is not None and len(full[name]) < LENGTH)]
        for name in item_names(items)
    }
    name, item, key = list(zip(item_names(items), items, item_keys(cfg.seed, items), strict=True))[
        1
    ]
    runs = by_label(results)
    assert all(run["kl"].keys() == set(list(texts)[:3]) for x, run in runs.items() if x != "full")
    longest = max(map(len, list(texts.values())[:3]))
    run = runs["static k=2"]
    layers = tuple(run["policy"]["layers"])
    expected = kl_by_hand(model, key, item.prompt, texts[name], layers, longest)
    assert expected > 1e-6 and run["kl"][name] == pytest.approx(expected, rel=1e-3)
    rows = {row.policy: row for row in compute_sweep_rows(results)}
    assert rows["static k=2"].kl == pytest.approx(np.mean(list(run["kl"].values())))
    assert rows["full"].kl is None


def test_a_stopped_measurement_of_the_kl_goes_on(grown, tmp_path, monkeypatch):
    cfg, workdir, _, results, _ = grown
    workdir = shutil.copytree(workdir, tmp_path / "sweep")
    lines = (workdir / "runs.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if "kl" not in json.loads(line)]
    first = next(line for line in lines if "kl" in json.loads(line))
    (workdir / "runs.jsonl").write_text("".join([*kept, first]))
    calls = []
    measure = full_depth.kl_batches
    counted = lambda *args: calls.append(len(args[2])) or measure(*args)  # noqa: E731
    monkeypatch.setattr(full_depth, "kl_batches", counted)
    again = sweep.sweep(cfg, workdir)
    assert sum(calls) == 3 * len(set(map(tuple, _sets(results)))) - len(json.loads(first)["kl"])
    assert [run.get("kl") for run in again["runs"]] == [run.get("kl") for run in results["runs"]]


def _sets(results):
    return [run["policy"]["layers"] for run in results["runs"] if "layers" in run["policy"]]


def test_the_page_has_the_columns_and_both_kinds(grown):
    _, workdir, *_ = grown
    page = (workdir / "report.html").read_text()
    for text in ("retention, %", "identical, %", "KL", "Neighbours allowed or not"):
        assert f"<th>{text}" in page or f"<h2>{text}" in page
    with (workdir / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["adjacent"] for row in rows] == ["False", "False", "True", "False", "True"]
    assert all(float(row["kl"]) >= 0 for row in rows[1:]) and rows[0]["kl"] == ""


def test_more_layers_than_fit_without_neighbours_are_refused_before_anything_runs(
    config, tmp_path, monkeypatch
):
    monkeypatch.setattr(sweep, "score_task", None)
    cfg = dataclasses.replace(config("qwen2_tiny"), num_static=(3,))
    message = "cannot skip 3 of 4 layers without neighbours: at most 2 fit"
    for kinds in ((False,), (True, False)):
        with pytest.raises(InputError, match=message):
            sweep.sweep(dataclasses.replace(cfg, allow_adjacent=kinds), tmp_path / "sweep")
    with pytest.raises(InputError, match=r"allow_adjacent=\(\) is neither kind"):
        dataclasses.replace(cfg, allow_adjacent=())
