"""A whole sweep on a random model: what it writes, how it goes on, and what it refuses."""

import csv
import dataclasses
import json
import re
import shutil
from functools import cache, partial
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import dials_jax as dj
from dials_jax.caching.early_skip.settings import EarlySkip
from dials_jax.caching.plain import DualCache
from dials_jax.compiling import total_compile_seconds
from dials_jax.config import (
    ArithmeticData,
    EvalConfig,
    EvalTask,
    MeshConfig,
    OptimizerConfig,
    RouterConfig,
    TaskData,
    TrainConfig,
    to_dict,
)
from dials_jax.data.tokenizer import character_tokenizer, load_tokenizer
from dials_jax.errors import InputError
from dials_jax.evaluation import (
    batched,
    candidates,
    static_choice,
    sweep,
    sweep_identity,
    timing,
)
from dials_jax.evaluation.calibration import CalibrationPrompts
from dials_jax.evaluation.items import items_digest, load_items
from dials_jax.evaluation.scoring import score_task, time_task
from dials_jax.files import read_json
from dials_jax.loading import load
from dials_jax.nn.policy import policy_name
from dials_jax.reporting import sweep_report
from dials_jax.reporting.sweep_rows import compute_sweep_rows
from dials_jax.sampling.confidence import Confidence
from dials_jax.skipping.storage import (
    FittedThresholds,
    load_router,
    router_facts,
    save_fitted,
    save_router,
)
from dials_jax.workdir import exclusive
from tests.conftest import jitted_init_routers

ARITHMETIC = ArithmeticData(operations=("max", "add"))
RECORDS = [{"prompt": f"+{a},{a + 7}=", "answer": str(2 * a + 7)} for a in range(11, 16)]
SAMPLER = Confidence(gen_length=4, steps=2)
GUIDED = Confidence(gen_length=3, cfg_scale=0.5)
LABELS = ["full", "static k=1", "routed λ=0.5", "random k=2"]


@pytest.fixture(scope="module", autouse=True)
def loaded_once():
    """Sweeps of one model share it: reading it would be most of the time of most of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "load", cache(sweep.load))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory, arithmetic_model):
    """Router workdirs "a" and "b", of one lambda, and records for the NELBO."""
    folder = tmp_path_factory.mktemp("sweep")
    model, cfg = (
        load(arithmetic_model),
        RouterConfig(d_hidden=8, skip_threshold=0.5, execute_bias=0.0),
    )
    for seed, name in enumerate("ab"):
        key = jax.random.key(seed)
        routers = jitted_init_routers(model.config.d_model, model.num_layers, cfg, key)
        routers["vote"] = 20 * jax.random.normal(key, routers["vote"].shape)
        save_router(folder / name / "router", routers, cfg, model, skip_weight=0.5)
    lines = "".join(json.dumps(record) + "\n" for record in RECORDS)
    (folder / "records.jsonl").write_text(lines)
    return folder


@pytest.fixture(scope="module")
def cfg(folder, arithmetic_model):
    data = TaskData(paths=(str(folder / "records.jsonl"),), prompt_length=8, answer_length=4)
    return EvalConfig(
        model=str(arithmetic_model),
        routers=(str(folder / "a"),),
        tasks=(
            EvalTask(name="sums", metric="exact_match", data=ARITHMETIC, limit=6, sampler=SAMPLER),
            EvalTask(name="records", metric="nelbo", data=data, num_samples=4),
        ),
        num_static=(1,),
        num_random=(2,),
        num_calibration=4,
        batch_size=4,
    )


@pytest.fixture(scope="module")
def finished(cfg, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep_report, "_figures", lambda *args: [])  # slow, and made after every run
        sweep.sweep(cfg, workdir)
    return workdir


def forget_sources(results, router):
    """Leaves out of results.json what versions without records did not write."""
    for run in results["runs"]:
        del run["seed"], run["items_digest"]
        run.pop("identical", None)
        for name in ("router", "training", "folder"):
            run["policy"].pop(name, None)
    del results["tasks"]
    results["routers"] = {str(router): router_facts(router)[1].digests}


def runs_of(workdir):
    """What the runs found, measured times apart."""
    runs = read_json(workdir / "results.json")["runs"]
    for run in runs:
        assert run["flops"].pop("seconds") > 0
    return runs


def test_data_that_is_wrong_is_seen_before_weights_are_read(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "load", lambda *args: pytest.fail("weights were read"))
    lost = TaskData(paths=(str(tmp_path / "none.jsonl"),), prompt_length=8, answer_length=4)
    changes = [
        ({"tasks": (dataclasses.replace(cfg.tasks[1], data=lost),)}, r"none\.jsonl is missing"),
        ({"tasks": cfg.tasks[:1] * 2}, "tasks: .* names one twice"),
        ({"num_random": (9,)}, "9"),
        ({"tasks": (dataclasses.replace(cfg.tasks[1], num_samples=17),)}, "a multiple of 16"),
        ({"mesh": MeshConfig(data=7)}, "does not fit"),
    ]
    for change, message in changes:
        with pytest.raises(InputError, match=message):
            sweep.sweep(dataclasses.replace(cfg, **change), tmp_path / "run")


def test_what_is_left_to_score_is_counted_by_policy(cfg, finished, tmp_path, capsys, monkeypatch):
    """Policies of an earlier call are not those of this one."""
    monkeypatch.setattr(sweep, "_score_candidate", lambda *args: pytest.fail("begins"))
    shutil.copytree(finished, tmp_path / "run")

    def left(**changes):
        with pytest.raises(pytest.fail.Exception):
            sweep.sweep(dataclasses.replace(cfg, **changes), tmp_path / "run")
        found = re.findall(r"what is left to score: ([\d,]+) tokens", capsys.readouterr().out)
        return [int(tokens.replace(",", "")) for tokens in found]

    of_sums, of_records = 6 * 4, 4 * sum(len(record["answer"]) for record in RECORDS)
    one = of_sums + of_records  # of one policy
    assert left(num_random=(1, 3), num_static=(), routers=()) == [2 * one]
    assert left(num_random=(2,), static_layers=((0, 2),)) == [one]
    assert left(seed=1, num_static=()) == [3 * one]


def test_every_policy_is_scored_on_every_task(finished):
    runs = runs_of(finished)
    assert [(r["task"], r["policy"]["label"]) for r in runs] == [
        (task, label) for task in ("sums", "records") for label in LABELS
    ]
    layers_run = {r["policy"]["label"]: r["flops"]["layers_run"] for r in runs}
    assert 0 < layers_run.pop("routed λ=0.5") < 1
    assert layers_run == {"full": 1.0, "static k=1": 0.75, "random k=2": 0.5}
    for run in runs:
        values = list(run["items"].values())
        if run["task"] == "sums":
            assert len(values) == 6 and set(values) <= {0.0, 1.0}
        else:
            assert len(values) == len(RECORDS) and min(values) > 0
    assert len({json.dumps(r["items"]) for r in runs if r["task"] == "records"}) == len(LABELS)


def test_the_report_is_written_again_without_a_run(cfg, finished, tmp_path, monkeypatch, capsys):
    workdir = shutil.copytree(finished, tmp_path / "sweep")
    monkeypatch.setattr(sweep, "score_task", None)
    figures = sweep_report._figures
    monkeypatch.setattr(sweep_report, "_figures", lambda *args: figures(*args)[:2])
    found = sweep.sweep(cfg, workdir)
    assert "what is left to score" not in capsys.readouterr().out
    assert found == dj.load_results(workdir)
    assert [row.policy for row in found.rows] == 2 * LABELS
    with (workdir / "results.csv").open(newline="") as file:
        assert [row["policy"] for row in csv.DictReader(file)] == 2 * LABELS
    assert "routed λ=0.5" in (workdir / "report.html").read_text()
    assert len(list((workdir / "plots").glob("*.png"))) >= 2


class Scorer:
    """`score_task`, counted; it stops the sweep before run `stop`."""

    def __init__(self, stop):
        self.stop, self.calls, self.score_task = stop, 0, sweep.score_task

    def __call__(self, *args, **kwargs):
        if self.calls == self.stop:
            raise KeyboardInterrupt
        self.calls += 1
        return self.score_task(*args, **kwargs)


def flops_ahead(shown):
    """FLOPs that a sweep says are left."""
    [line] = [line for line in shown.splitlines() if line.startswith("what is left to score: ")]
    return float(line.split(", ")[1].split()[0].rpartition(" ")[2])


def test_an_interrupted_sweep_goes_on_where_it_stopped(
    cfg, finished, tmp_path, monkeypatch, without_plots, capsys
):
    first = Scorer(stop=5)
    monkeypatch.setattr(sweep, "score_task", first)
    with pytest.raises(KeyboardInterrupt):
        sweep.sweep(cfg, tmp_path)
    assert len(runs_of(tmp_path)) == 5
    before = flops_ahead(capsys.readouterr().out)
    monkeypatch.undo()
    monkeypatch.setattr(sweep_report, "_figures", lambda *args: [])
    second = Scorer(stop=None)
    monkeypatch.setattr(sweep, "score_task", second)
    sweep.sweep(cfg, tmp_path)
    assert 0 < flops_ahead(capsys.readouterr().out) < before
    assert first.calls + second.calls == len(runs_of(finished))
    assert runs_of(tmp_path) == runs_of(finished)


def test_results_do_not_depend_on_the_batch_size(cfg, finished, tmp_path, without_plots):
    sweep.sweep(dataclasses.replace(cfg, batch_size=5, num_static=()), tmp_path)
    expected = {(r["task"], r["policy"]["label"]): r["items"] for r in runs_of(finished)}
    for run in runs_of(tmp_path):
        items = expected[run["task"], run["policy"]["label"]]
        assert run["items"].keys() == items.keys()
        np.testing.assert_allclose([*run["items"].values()], [*items.values()], rtol=1e-4)


def test_the_workdir_of_another_model_is_refused(cfg, finished, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "sweep")
    with pytest.raises(InputError, match=r"another sweep \(dtype differ\)") as error:
        sweep.sweep(dataclasses.replace(cfg, dtype="bfloat16"), workdir)
    assert "\n" not in str(error.value)
    (workdir / "results.json").write_text('{"kind": "SearchStudy", "config": {}}')
    with pytest.raises(InputError, match=r"results.json is not of a sweep; choose another"):
        sweep.sweep(cfg, workdir)


def test_relative_paths_name_the_same_sweep(cfg, folder, finished, tmp_path, monkeypatch):
    workdir = shutil.copytree(finished, tmp_path / "sweep")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sweep_report, "_figures", lambda *args: [])
    monkeypatch.setattr(sweep, "score_task", None)  # nothing is left to score
    data = dataclasses.replace(cfg.tasks[1].data, paths=("records.jsonl",))
    tasks = (cfg.tasks[0], dataclasses.replace(cfg.tasks[1], data=data))
    sweep.sweep(dataclasses.replace(cfg, routers=("a",), tasks=tasks), workdir)
    assert runs_of(workdir) == runs_of(finished)


def test_routers_and_items_that_changed_meanwhile_are_scored_anew(
    cfg, folder, finished, tmp_path, without_plots
):
    copy, workdir = shutil.copytree(folder, tmp_path / "in"), tmp_path / "out"
    data = dataclasses.replace(cfg.tasks[1].data, paths=(str(copy / "records.jsonl"),))
    task = dataclasses.replace(cfg.tasks[1], data=data)
    cfg = dataclasses.replace(
        cfg, tasks=(task,), routers=(str(copy / "a"),), num_static=(), num_random=()
    )
    results = read_json(finished / "results.json")
    results |= {"config": to_dict(cfg)}  # as versions without records left them
    results["runs"] = [run for run in results["runs"] if run["task"] == "records"]
    forget_sources(results, copy / "a")
    del results["items"]["sums"]
    workdir.mkdir()
    (workdir / "results.json").write_text(json.dumps(results))
    before = {run["policy"]["label"]: run["items"] for run in results["runs"]}

    shutil.copytree(copy / "b" / "router", copy / "a" / "router", dirs_exist_ok=True)
    runs = sweep.sweep(cfg, workdir)["runs"]
    first, second = (run for run in runs if run["policy"]["kind"] == "routed")
    assert first["items"] == before["routed λ=0.5"] != second["items"]
    text = (copy / "records.jsonl").read_text()
    (copy / "records.jsonl").write_text(text.replace('"29"', '"28"'))
    found = [run for run in sweep.sweep(cfg, workdir)["runs"] if run["policy"]["kind"] == "full"]
    assert [run["task"] for run in found] == ["records", "records, 5 items"]
    new, old = (run["items"] for run in found)
    assert old == before["full"] and len(new.keys() & old.keys()) == 4
    for name in new.keys() & old.keys():  # the four others were not scored again
        assert new[name] == old[name]


# ------------------------------------------------------------------------------------ timing


def test_times_are_repeated_in_turns_and_continue(
    cfg, finished, tmp_path, monkeypatch, without_plots, capsys
):
    workdir, order, seconds = shutil.copytree(finished, tmp_path / "sweep"), [], iter(range(1, 99))
    monkeypatch.setattr(sweep, "score_task", None)  # nothing is scored again

    def time_task(model, task, items, policy, *args):
        order.append(policy_name(policy))
        if len(order) == 9:
            raise KeyboardInterrupt
        return float(next(seconds))

    monkeypatch.setattr(timing, "time_task", time_task)
    cfg = dataclasses.replace(cfg, tasks=cfg.tasks[1:], num_static=(), routers=(), timing_repeats=3)
    before = runs_of(workdir)
    with pytest.raises(KeyboardInterrupt):
        sweep.sweep(dataclasses.replace(cfg, timing_repeats=5), workdir)
    # One untimed run of each before its first time; every turn begins with another policy.
    full, random = "full", "random"
    assert order == [full, full, random, random, random, full, full, random, random]
    order.append("again")
    results = sweep.sweep(cfg, workdir)  # three turns are there already
    assert order[-1] == "again"
    times = [r["timing"]["seconds"] for r in results["runs"] if "timing" in r]
    assert times == [[2.0, 6.0, 7.0], [4.0, 5.0, 8.0]]
    rows = {row.policy: row for row in compute_sweep_rows(results) if row.num_timings}
    assert rows["random k=2"].in_noise and rows["random k=2"].speedup is None
    assert rows["full"].timed_median == 6.0 and not rows["full"].in_noise
    assert "in the noise" in capsys.readouterr().out
    for run in results["runs"]:
        run.pop("timing", None), run["flops"].pop("seconds")
    assert all(run in results["runs"] for run in before)


def test_timing_runs_the_programs_of_scoring(cfg, arithmetic_model):
    model, tokenizer = load(arithmetic_model), load_tokenizer(arithmetic_model)
    for task in cfg.tasks:
        items = load_items(task, tokenizer, model.config)
        for first in (True, False):
            compiled = total_compile_seconds()
            assert time_task(model, task, items, None, 4, 0, num_batches=1) > 0
            assert first or total_compile_seconds() == compiled


# --------------------------------------------------------------------------------- going on


class Batches:
    """What scores a batch, counted; it stops the sweep before batch `stop`."""

    def __init__(self, monkeypatch, stop=None):
        self.stop, self.calls = stop, 0
        for name in ("generate", "score_pairs"):
            monkeypatch.setattr(batched, name, partial(self._count, getattr(batched, name)))

    def _count(self, function, *args, **kwargs):
        if self.calls == self.stop:
            raise KeyboardInterrupt
        self.calls += 1
        return function(*args, **kwargs)


def lines_of(workdir, kind="scores"):
    """Numbers of the lines of runs.jsonl that are records of a kind, and the lines."""
    lines = (workdir / "runs.jsonl").read_text().splitlines(keepends=True)
    return [i for i, line in enumerate(lines) if kind in json.loads(line)], lines


@pytest.fixture(scope="module")
def num_batches(finished):
    return len(lines_of(finished)[0])


@pytest.mark.parametrize("stop", [1, 10])
def test_a_stopped_policy_goes_on_with_its_next_batch(
    stop, cfg, finished, num_batches, tmp_path, monkeypatch, without_plots
):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        Batches(patch, stop)
        sweep.sweep(cfg, tmp_path)
    assert len(lines_of(tmp_path)[0]) == stop
    with (tmp_path / "runs.jsonl").open("a") as file:
        file.write('{"task": "sums", "pol')  # killed while writing
    rest = Batches(monkeypatch)
    sweep.sweep(cfg, tmp_path)
    assert rest.calls == num_batches - stop
    assert runs_of(tmp_path) == runs_of(finished)


def test_what_changes_no_score_may_change_on_the_way(
    cfg, finished, num_batches, tmp_path, monkeypatch, without_plots
):
    others = {
        "batch_size": 3,
        "layout": "unrolled",
        "mesh": MeshConfig(data=1),
        "num_random": (),
        "tasks": tuple(dataclasses.replace(t, bucket=8, max_programs=1) for t in cfg.tasks[:1]),
    }
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "score_task", None)  # nothing is left to score
        workdir = shutil.copytree(finished, tmp_path / "done")
        sweep.sweep(dataclasses.replace(cfg, **others), workdir)
        assert runs_of(workdir) == runs_of(finished)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        Batches(patch, 1)
        sweep.sweep(cfg, tmp_path / "part")
    sweep.sweep(dataclasses.replace(cfg, **others), tmp_path / "part")
    expected = {(r["task"], r["policy"]["label"]): r for r in runs_of(finished)}
    runs = runs_of(tmp_path / "part")
    assert [run["policy"]["label"] for run in runs] == LABELS[:3]
    for run in runs:
        before = expected[run["task"], run["policy"]["label"]]
        for name in ("items", "examples", "execution", "policy"):
            assert run[name] == before[name]
    assert [x["batch_size"] for x in runs[0]["measured"]] == [4, 4]  # as it began
    assert [x["batch_size"] for run in runs[1:] for x in run["measured"]] == [3] * (len(runs) - 1)
    with (tmp_path / "part" / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["speedup"] for row in rows] == [""] * 3  # the full model's time was of two kinds


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_a_run_keeps_its_batch_size_unless_that_changes_nothing(
    batch_invariant, cfg, tmp_path, monkeypatch, without_plots, capsys
):
    cfg = dataclasses.replace(
        cfg, tasks=cfg.tasks[:1], routers=(), num_static=(), num_random=(), batch_size=2,
        batch_invariant=batch_invariant,
    )  # fmt: skip
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        Batches(patch, 1)
        sweep.sweep(cfg, tmp_path)
    capsys.readouterr()
    found = sweep.sweep(dataclasses.replace(cfg, batch_size=3), tmp_path)
    shown, [run], [row] = capsys.readouterr().out, found["runs"], found.rows
    sizes = [one["batch_size"] for one in run["measured"]]
    assert sizes == ([2, 3] if batch_invariant else [2])
    assert row.batch_size == ("any" if batch_invariant else "2")
    assert ("in batches of 2 as it began" in shown) == (not batch_invariant)
    assert ("batch-invariant" if batch_invariant else "batch size 2") in shown
    page = (tmp_path / "report.html").read_text()
    assert ("batch-invariant" if batch_invariant else "batch size 2") in page


def test_policies_and_tasks_are_added(cfg, finished, tmp_path, monkeypatch, without_plots):
    one = dataclasses.replace(cfg, tasks=cfg.tasks[:1], num_static=(), num_random=(), routers=())
    sweep.sweep(one, tmp_path)
    rest = Scorer(stop=None)
    monkeypatch.setattr(sweep, "score_task", rest)
    sweep.sweep(dataclasses.replace(cfg, tasks=cfg.tasks[1:]), tmp_path)
    assert rest.calls == 4
    sweep.sweep(cfg, tmp_path)
    assert rest.calls == 7
    assert runs_of(tmp_path) == runs_of(finished)
    results = sweep.sweep(one, tmp_path)  # what is there stays in the results
    assert rest.calls == 7 and len(results["runs"]) == len(runs_of(finished))


def test_a_task_gets_more_items(cfg, finished, tmp_path, monkeypatch, without_plots):
    """What was scored of them stays; a run on fewer items is not compared with those on all."""
    short = dataclasses.replace(cfg.tasks[1], limit=3)
    few = dataclasses.replace(cfg, tasks=(short,), num_static=())
    sweep.sweep(few, tmp_path)
    more = dataclasses.replace(few, tasks=(cfg.tasks[1],), num_random=())
    with monkeypatch.context() as patch:
        counted = Batches(patch)
        sweep.sweep(more, tmp_path)
        assert counted.calls == 2 * 2  # four copies of two more items, in batches of four
    expected = {r["policy"]["label"]: r for r in runs_of(finished) if r["task"] == "records"}
    runs = [run for run in runs_of(tmp_path) if run["task"] == "records"]
    assert [run["policy"]["label"] for run in runs] == ["full", "routed λ=0.5"]
    for run in runs:
        assert run == expected[run["policy"]["label"]]
    results = sweep.sweep(dataclasses.replace(more, num_random=cfg.num_random), tmp_path)
    assert runs_of(tmp_path)[2] == expected["random k=2"]
    assert len(results["runs"]) == 3  # those on three items are exceeded
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "score_task", None)
        results = sweep.sweep(few, tmp_path)
    assert [run["task"] for run in results["runs"]] == 3 * ["records"] + 3 * ["records, 5 items"]


def test_runs_on_fewer_items_stay_until_all_have_more(cfg, tmp_path, without_plots):
    short = dataclasses.replace(cfg.tasks[1], limit=3)
    few = dataclasses.replace(cfg, tasks=(short,), num_static=(), routers=())
    sweep.sweep(few, tmp_path)
    results = sweep.sweep(dataclasses.replace(few, tasks=(cfg.tasks[1],), num_random=()), tmp_path)
    assert [(run["task"], run["policy"]["label"]) for run in results["runs"]] == [
        ("records", "full"), ("records, 3 items", "full"), ("records, 3 items", "random k=2"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "again"),
    [
        ({"seed": 1}, 6),
        ({"skip_threshold": 0.7}, 2),
        ({"similarity_threshold": -1.0}, 0),  # the same layers are chosen
    ],
)
def test_only_what_other_settings_change_is_scored_again(
    changes, again, cfg, finished, tmp_path, monkeypatch, without_plots
):
    workdir, scorer = shutil.copytree(finished, tmp_path / "sweep"), Scorer(stop=None)
    monkeypatch.setattr(sweep, "score_task", scorer)
    cfg = dataclasses.replace(cfg, num_random=(), **changes)
    before, results = runs_of(workdir), sweep.sweep(cfg, workdir)
    assert scorer.calls == again
    for run in results["runs"]:
        run["flops"].pop("seconds")
    assert all(run in results["runs"] for run in before)
    assert len(results["runs"]) == len(before) + again


def test_routers_and_seeds_of_one_lambda_meet_in_one_row(
    cfg, folder, finished, tmp_path, without_plots
):
    workdir = shutil.copytree(finished, tmp_path / "sweep")
    one = dataclasses.replace(cfg, tasks=cfg.tasks[1:], num_static=(), num_random=())
    sweep.sweep(dataclasses.replace(one, routers=(str(folder / "b"),)), workdir)
    both = tuple(str(folder / name) for name in "ab")
    results = sweep.sweep(dataclasses.replace(one, routers=both, seed=1), workdir)
    values = {
        (run["policy"].get("folder"), run["seed"]): run["items"]
        for run in results["runs"]
        if run["task"] == "records" and run["policy"]["kind"] in ("full", "routed")
    }
    assert values.keys() == {(name, seed) for name in (None, "a", "b") for seed in (0, 1)}
    rows = {row.policy: row for row in compute_sweep_rows(results) if row.task == "records"}
    routed, full = rows["routed λ=0.5"], rows["full"]
    assert (routed.num_seeds, full.num_seeds, rows["static k=1"].num_seeds) == (4, 2, 1)
    means = [np.mean([*x.values()]) for (name, _), x in values.items() if name]
    assert routed.value == pytest.approx(np.mean(means))
    assert routed.seed_stdev == pytest.approx(np.std(means, ddof=1))
    assert routed.difference == pytest.approx(routed.value - full.value)
    assert routed.low < routed.value < routed.high


def test_routers_that_were_trained_otherwise_have_a_row_of_their_own(
    cfg, folder, tmp_path, arithmetic_model, without_plots
):
    routed, model = load_router(folder / "b", load(arithmetic_model)), load(arithmetic_model)
    other = dataclasses.replace(router_facts(folder / "b")[1].router, execute_bias=0.5)
    save_router(tmp_path / "c", routed.router, other, model, skip_weight=0.5)
    routers = (str(folder / "a"), str(tmp_path / "c"))
    cfg = dataclasses.replace(
        cfg, tasks=cfg.tasks[1:], routers=routers, num_static=(), num_random=()
    )
    results = sweep.sweep(cfg, tmp_path / "sweep")
    labels = [run["policy"]["label"] for run in results["runs"]]
    assert labels == ["full", "routed λ=0.5 (a)", "routed λ=0.5 (c)"]


def test_one_process_at_a_time(cfg, tmp_path):
    with exclusive(tmp_path), pytest.raises(InputError, match="is in use by process"):
        sweep.sweep(cfg, tmp_path)


@pytest.mark.parametrize("name", ["results.csv", "report.html", "plots", "runs.jsonl"])
def test_files_of_others_are_not_overwritten(name, cfg, tmp_path):
    (tmp_path / name).mkdir() if name == "plots" else (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match=f"{name} was not made by a run of this folder"):
        sweep.sweep(cfg, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


# ------------------------------------------------------------------------------------ damage


def test_an_odd_line_is_set_aside_and_measured_again(
    cfg, finished, tmp_path, monkeypatch, without_plots, capsys
):
    """So is what a finished run lacks without it: outputs, which are compared with full depth's.

    Likelihoods of a finished run are all in its own line, and cost nothing.
    """
    workdir = shutil.copytree(finished, tmp_path / "sweep")
    batches, lines = lines_of(workdir)
    runs, _ = lines_of(workdir, "run")
    outputs = [number for number in batches if '"outputs"' in lines[number]]
    bounds = [number for number in batches if number not in outputs]
    for number in (outputs[0], runs[0], outputs[-1], bounds[0]):
        place = lines[number].rindex("0")
        lines[number] = lines[number][:place] + "1" + lines[number][place + 1 :]
    lines[runs[-1]] = "oops" + lines[runs[-1]]
    (workdir / "runs.jsonl").write_text("".join(lines))
    (workdir / "results.json").write_text("{")  # written again from the records
    counted = Batches(monkeypatch)
    sweep.sweep(cfg, workdir)
    assert counted.calls == 2
    assert runs_of(workdir) == runs_of(finished)
    assert len((workdir / "runs.odd.jsonl").read_text().splitlines()) == 5
    shown = capsys.readouterr().err
    assert (
        f"runs.jsonl, line {outputs[0] + 1} is damaged (its digest does not fit): it is set"
        in shown
    )
    assert f"runs.jsonl, line {runs[-1] + 1} is damaged" in shown
    sweep.sweep(cfg, workdir)
    assert counted.calls == 2 and "set aside" not in capsys.readouterr().err


@pytest.fixture
def before(cfg, finished, folder, tmp_path):
    """A sweep by a version that kept results.json alone, and a function that changes it."""
    workdir = shutil.copytree(finished, tmp_path / "before")
    for name in ("runs.jsonl", "sweep.json"):
        (workdir / name).unlink()
    results = read_json(workdir / "results.json")
    forget_sources(results, folder / "a")
    for run in results["runs"]:
        del run["measured"]
    results["config"]["tasks"][0].pop("max_programs")  # a setting that is newer

    def change(edit=lambda results: None):
        edit(results)
        (workdir / "results.json").write_text(json.dumps(results))
        return workdir

    change()
    return change


def test_a_sweep_of_a_version_without_records_goes_on(
    before, cfg, finished, monkeypatch, without_plots
):
    rest = Scorer(stop=None)
    monkeypatch.setattr(sweep, "score_task", rest)
    workdir = before(lambda results: results["runs"].pop(2))
    sweep.sweep(cfg, workdir)
    assert rest.calls == 1
    sweep.sweep(cfg, workdir)
    assert rest.calls == 1
    runs = runs_of(workdir)
    measured = [run.pop("measured", None) for run in runs]
    assert [x is not None for x in measured] == [i == 2 for i in range(8)]
    left_out = ("measured", "rules", "identical")  # the full model's outputs were not stored
    assert runs == [{k: r[k] for k in r if k not in left_out} for r in runs_of(finished)]
    sweep.sweep(dataclasses.replace(cfg, seed=1, tasks=cfg.tasks[1:], routers=()), workdir)
    assert rest.calls == 4  # three policies


def test_scores_by_other_rules_are_not_continued(
    before, cfg, finished, tmp_path, monkeypatch, without_plots
):
    rest = Scorer(stop=None)
    monkeypatch.setattr(sweep, "score_task", rest)
    one = dataclasses.replace(cfg, num_static=(), num_random=(), routers=())
    workdir = before(lambda results: results.pop("rules"))
    results = sweep.sweep(dataclasses.replace(one, tasks=cfg.tasks[:1]), workdir)
    assert rest.calls == 1 and results["rules"] == {"sums, rules 2": 2, "sums": 1, "records": 1}
    workdir = shutil.copytree(finished, tmp_path / "sweep")
    monkeypatch.setitem(sweep_identity.METRIC_RULES, "nelbo", 7)
    results = sweep.sweep(dataclasses.replace(one, tasks=cfg.tasks[1:]), workdir)
    assert rest.calls == 2 and results["rules"]["records, rules 7"] == 7
    assert all(run in [*results["runs"]] for run in saved_runs(finished))


def saved_runs(workdir):
    return read_json(workdir / "results.json")["runs"]


DAMAGE = {
    "a run is text": lambda r: r["runs"].__setitem__(0, "full"),
    "no policy": lambda r: r["runs"][1].pop("policy"),
    "items are text": lambda r: r["runs"][0]["items"].update({"x": "1.0"}),
    "no seconds": lambda r: r["runs"][0]["flops"].pop("seconds"),
    "uneven execution": lambda r: r["runs"][0]["execution"]["executed"][3].append(1),
    "a kind of policy": lambda r: r["runs"][0]["policy"].update(kind="fool"),
    "a number that is no float": lambda r: r["runs"][0]["flops"].update(seconds=10**400),
    "no score": lambda r: r["runs"][0]["items"].update({"x": None}),
    "runs are a number": lambda r: r.update(runs=3),
    "no config": lambda r: r.pop("config"),
    "an example without output": lambda r: r["runs"][0]["examples"][0].pop("output"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_results_of_a_version_without_records(damage, before, cfg):
    workdir = before(DAMAGE[damage])
    left = (workdir / "results.json").read_text()
    with pytest.raises(InputError, match=r"results.json is damaged .*; put it back") as error:
        sweep.sweep(cfg, workdir)
    assert "\n" not in str(error.value) and (workdir / "results.json").read_text() == left


def test_broken_results_are_not_overwritten(cfg, tmp_path):
    (tmp_path / "results.json").write_text('{"runs": [')
    with pytest.raises(InputError, match=r"results.json is not valid JSON.*move it away"):
        sweep.sweep(cfg, tmp_path)
    assert (tmp_path / "results.json").read_text() == '{"runs": ['


TASK = EvalTask(name="sums", metric="exact_match", data=ARITHMETIC, limit=4)
ES = dataclasses.replace(TASK, cache=EarlySkip(prompt_every=1, block_every=1))
NELBO = EvalTask(name="nelbo", metric="nelbo", data=ARITHMETIC, limit=4, num_samples=20)


OTHERS = {
    "threshold": {"sampler": dataclasses.replace(SAMPLER, threshold=0.5)},
    "factor": {"sampler": dataclasses.replace(SAMPLER, factor=1.0)},
    "stop_at_eos": {"sampler": dataclasses.replace(SAMPLER, stop_at_eos=True)},
    "cache": {"cache": DualCache()},
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_way_to_generate_is_scored_beside_the_first(
    name, cfg, finished, tmp_path, monkeypatch
):
    workdir = shutil.copytree(finished, tmp_path / "sweep")
    task = dataclasses.replace(cfg.tasks[0], **OTHERS[name])
    seen = []

    def stop(model, task, *args, records, **kwargs):
        seen.append(records)
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "score_task", stop)
    with pytest.raises(KeyboardInterrupt):
        sweep.sweep(dataclasses.replace(cfg, tasks=(task,)), workdir)
    assert seen == [[]]
    *_, new = read_json(workdir / "sweep.json")["tasks"]
    assert new.startswith("sums, ") and name in new


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cache": "duel"}, "cache='duel' must be a PrefixCache or a DualCache or a EarlySkip"),
        ({"sampler": "dream"}, "sampler='dream' must be a Confidence or a Dream or"),
        ({"sampler": {"gen_length": 4, "threshold": 0.9, "factor": 1.0}}, "give one of them"),
        ({"sampler": {"gen_length": 4, "threshold": -0.1}}, "threshold=-0.1 must not be negative"),
        ({"sampler": {"gen_length": 4, "block_length": 3}}, "must be divisible"),
        ({"extract": "("}, "correct the expression"),
    ],
)
def test_a_wrong_way_to_generate_is_refused_before_a_model_is_loaded(
    changes, message, cfg, tmp_path, monkeypatch, untyped
):
    monkeypatch.setattr(sweep, "load", None)
    if isinstance(changes.get("sampler"), dict):
        changes = {"sampler": changes["sampler"] | {"kind": "Confidence"}}
    with pytest.raises(InputError, match=message) as error:
        task = dataclasses.replace(TASK, **changes)
        sweep.sweep(dataclasses.replace(cfg, tasks=(task,)), tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ()}, "no tasks"),
        (
            {"tasks": (dataclasses.replace(ES, sampler=Confidence(4, 1), cache=EarlySkip()),)},
            "must div",
        ),
        ({"tasks": (dataclasses.replace(ES, sampler=GUIDED),)}, "does not compose with guidance"),
        ({"tasks": (ES,)}, "fall on layers"),
        ({"tasks": (TASK, TASK)}, "tasks: .* names one twice"),
        ({"tasks": (TASK, NELBO)}, "num_samples=20 must be a multiple of 16"),
        ({"num_random": (4,)}, "cannot skip 4 of 4 layers"),
        ({"num_static": (0,)}, "cannot skip 0 of 4 layers"),
        ({"num_random": (2, 2)}, "num_random: .* names one twice"),
        ({"skip_threshold": 1.0}, "threshold=1.0"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_run(
    changes, message, cfg, tmp_path, monkeypatch
):
    monkeypatch.setattr(sweep, "score_task", None)
    with pytest.raises(InputError, match=message):
        sweep.sweep(dataclasses.replace(cfg, **changes), tmp_path)
    assert not (tmp_path / "results.json").exists()


def test_static_layers_need_prompts(cfg, tmp_path, without_plots):
    data = dataclasses.replace(cfg.tasks[1].data, prompt="")
    cfg = dataclasses.replace(cfg, tasks=(dataclasses.replace(cfg.tasks[1], data=data),))
    with pytest.raises(InputError, match=r"task 'records' has empty prompts.*set num_static=\(\)"):
        sweep.sweep(cfg, tmp_path)
    sweep.sweep(dataclasses.replace(cfg, num_static=(), num_random=(), routers=()), tmp_path)
    assert len(runs_of(tmp_path)) == 1


@pytest.mark.parametrize("threshold, chosen", [(None, [(3,), (1, 3)]), (0.95, [(3,)]), (0.999, [])])
def test_static_layers_are_as_similar_as_asked(
    threshold, chosen, cfg, arithmetic_model, monkeypatch, capsys, untyped
):
    """Layers 3 and 1 are the most similar ones that are not adjacent."""
    monkeypatch.setattr(static_choice, "prompt_similarities", None)
    calibration = CalibrationPrompts((), "none", of_test=True)
    found = {"similarities": [0.2, 0.9, 0.97, 0.99], "by_prompt": []}
    known = {("records (2)", items_digest(())): found}
    records = SimpleNamespace(similarities=known, names={"records": "records (2)"})
    cfg = dataclasses.replace(cfg, num_static=(1, 2), similarity_threshold=threshold)
    model = load(arithmetic_model)
    found = sweep.static_candidates(cfg, model, cfg.tasks[1], calibration, records)
    assert [tuple(np.flatnonzero(~candidate.policy.gates)) for candidate in found] == chosen
    assert [tuple(candidate.facts["layers"]) for candidate in found] == chosen
    assert [candidate.facts["num_skipped"] for candidate in found] == [*map(len, chosen)]
    assert capsys.readouterr().out.count("Algorithm 1 finds only") == 2 - len(chosen)


@pytest.mark.parametrize("order", ["ca", "ac"])
def test_every_router_runs_under_its_own_lambda_in_rising_order(
    order, cfg, folder, tmp_path, arithmetic_model
):
    model, paths = load(arithmetic_model), {"a": folder / "a", "c": tmp_path / "c"}
    routed = load_router(folder / "b", model)
    save_router(paths["c"], routed.router, router_facts(folder / "b")[1].router, model, 2.0)
    cfg = dataclasses.replace(cfg, routers=tuple(str(paths[name]) for name in order))
    found, routers = sweep.routed_candidates(cfg, model)
    assert [one.describe()["lambda"] for one in found] == [0.5, 2.0]
    for candidate, name in zip(found, "ac", strict=True):
        digests = router_facts(paths[name])[1].digests
        assert routers[candidate.facts["router"]]["digests"] == digests
        own = load_router(paths[name], model)
        assert jax.tree.all(jax.tree.map(np.array_equal, candidate.policy.router, own.router))


def test_several_thresholds_join_a_sweep_and_load_the_router_once(
    cfg, finished, tmp_path, monkeypatch, without_plots, capsys
):
    loads = []
    load_once = candidates.load_router
    monkeypatch.setattr(
        candidates, "load_router", lambda *args: loads.append(args) or load_once(*args)
    )
    monkeypatch.setattr(sweep, "advice_if_idle", lambda share: f"advice at {share:.2f}")
    workdir = shutil.copytree(finished, tmp_path / "sweep")
    several = dataclasses.replace(cfg, skip_threshold=(0.0, 0.9), tasks=cfg.tasks[1:])
    sweep.sweep(several, workdir)
    runs = {r["policy"]["label"]: r for r in runs_of(workdir) if r["task"] == "records"}
    labels = ["routed λ=0.5 τ=0", "routed λ=0.5 τ=0.9", "routed λ=0.5"]
    assert list(runs) == [*LABELS[:2], *labels, LABELS[3]]
    shares = [runs[label]["flops"]["layers_run"] for label in labels]
    assert shares[0] <= shares[2] <= shares[1]
    found, _ = sweep.routed_candidates(several, load(cfg.model))
    assert [candidate.policy.threshold for candidate in found] == [0.0, 0.9]
    assert runs["routed λ=0.5"] == runs_of(finished)[len(LABELS) + 2]
    assert len(loads) == 2  # once here, and once by the sweep
    assert f"records, {labels[0]}: advice at {shares[0]:.2f}" in capsys.readouterr().out
    results = sweep.sweep(dataclasses.replace(several, skip_threshold=0.2), workdir)
    labels = [r["policy"]["label"] for r in results["runs"] if r["policy"]["kind"] == "routed"]
    assert labels[:4] == [f"routed λ=0.5{tau}" for tau in (" τ=0", " τ=0.2", " τ=0.9", "")]


def test_fitted_thresholds_and_soft_votes_are_policies_of_their_own(
    cfg, folder, tmp_path, arithmetic_model
):
    model, path = load(arithmetic_model), shutil.copytree(folder / "a", tmp_path / "a")
    fit = FittedThresholds(
        execution_ratio=0.7, votes="soft", thresholds=(1.0, 0.2, 0.3, 0.1), reached=0.71,
        num_sequences=8,
    )  # fmt: skip
    save_fitted(path, fit)
    cfg = dataclasses.replace(cfg, routers=(str(path),), votes="soft", execution_ratios=(0.7,))
    (soft, fitted), routers = sweep.routed_candidates(cfg, model)
    assert (soft.label, fitted.label) == ("routed λ=0.5 soft", "routed λ=0.5 fitted to 0.7")
    assert (soft.policy.votes, soft.policy.threshold) == ("soft", 0.5)
    np.testing.assert_array_equal(fitted.policy.threshold, np.float32(fit.thresholds))
    assert routers[fitted.facts["router"]]["threshold"] == list(fit.thresholds)
    assert routers[soft.facts["router"]]["votes"] == "soft"
    other = dataclasses.replace(cfg, execution_ratios=(0.5,))
    with pytest.raises(InputError, match=r"execution_ratio=0\.5 \(fitted: 0\.7\); fit them"):
        sweep.routed_candidates(other, model)


def test_seeds_of_one_training_are_told_from_other_trainings(folder, tmp_path):
    """By the settings in the workdirs of training, of any version; how often it logs is none."""
    path, info = router_facts(folder / "a")
    optimizer = OptimizerConfig(learning_rate=1e-3, num_steps=3, warmup_steps=1)
    train = TrainConfig(data=ARITHMETIC, backbone="x", optimizer=optimizer)

    def training(number, stored, **changes):
        workdir = tmp_path / number
        shutil.copytree(path, workdir / "router")
        (workdir / "config.json").write_text(json.dumps({"train": stored | changes}))
        return sweep_identity.router_training(workdir / "router", info)

    values = to_dict(train)
    first = training("0", values)
    assert first == training("1", values, seed=1) == training("2", values, log_every=3)
    older = {name: x for name, x in values.items() if name != "remat"}
    assert first == training("3", older)
    assert first != training("4", values, batch_size=train.batch_size + 1)
    assert sweep_identity.router_training(path, info) not in (first, None)  # a router alone


def test_a_router_that_is_given_twice_is_refused(cfg, folder, tmp_path):
    both = dataclasses.replace(cfg, routers=2 * (str(folder / "a"),))
    with pytest.raises(InputError, match="hold one router, weight for weight"):
        sweep.sweep(both, tmp_path)


def test_a_tasks_tokenizer_is_used_for_its_items_and_its_outputs(
    cfg, arithmetic_model, folder, tmp_path, without_plots
):
    records = [{"prompt": p, "answer": a} for p, a in (("1+2=", "3"), ("4+5=", "9"))]
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    own = load_tokenizer(arithmetic_model)
    spelling = "".join(own.id_to_token(i) for i in range(2, own.vocab_size - 1))
    other = character_tokenizer(spelling[::-1])  # the same characters, other ids
    other.save(tmp_path / "other")
    data = TaskData(paths=(str(path),), prompt_length=8, answer_length=4)
    named = dataclasses.replace(data, tokenizer=str(tmp_path / "other"))
    tasks = [
        EvalTask(name=name, metric="exact_match", data=d, sampler=Confidence(4, steps=2))
        for name, d in (("own", data), ("other", named))
    ]
    cfg = dataclasses.replace(cfg, tasks=tuple(tasks), routers=(), num_static=(), num_random=())
    sweep.sweep(cfg, tmp_path / "sweep")
    examples = {run["task"]: run["examples"] for run in runs_of(tmp_path / "sweep")}
    assert [e["prompt"] for e in examples["other"]] == ["1+2=", "4+5="]
    model = load(arithmetic_model)
    for task, tokenizer in zip(tasks, (own, other), strict=True):
        items = load_items(task, tokenizer, model.config)
        scores = score_task(model, task, items, tokenizer, None, cfg.batch_size, cfg.seed)
        assert scores.examples == examples[task.name]
    assert examples["own"] != examples["other"]


def test_batches_are_not_lost_with_the_file_that_says_of_what_they_are(cfg, finished, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "sweep")
    (workdir / "sweep.json").unlink()
    records = (workdir / "runs.jsonl").read_bytes()
    with pytest.raises(InputError, match=r"holds runs.jsonl but no sweep.json.*put it back"):
        sweep.sweep(cfg, workdir)
    assert (workdir / "runs.jsonl").read_bytes() == records
