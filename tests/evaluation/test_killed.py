"""Commands that are killed at one write after the other end with the results of one that is not."""

import functools
import json
from pathlib import Path

import pytest

from dials_jax.config import ArithmeticData, EvalConfig, EvalTask, TaskData
from dials_jax.evaluation import sweep
from dials_jax.evaluation.compare_sweeps import compare_sweeps
from dials_jax.files import read_json
from dials_jax.records import Records, format_line
from dials_jax.reporting import sweep_report
from dials_jax.sampling.confidence import Confidence

# What may differ: times, and what measured them.
OF_TIME = ("seconds", "compile_seconds", "measured", "environment", "commands", "started")


class Kill(BaseException):
    """Stands for SIGKILL: nothing is written after it."""


@pytest.fixture
def kill_at(monkeypatch):
    """`kill_at(n)`: the n-th write of files from here on does not happen, half happens or ends."""
    state = {"left": -1, "dead": False, "how": 0}
    add, replace = Records.add, Path.replace

    def count():
        if state["dead"]:
            raise Kill
        state["left"] -= 1
        state["dead"] = state["left"] == 0
        return state["dead"]

    def adding(self, record):
        if not count():
            return add(self, record)
        line = format_line(record) + "\n"
        part = (0, len(line) // 2, len(line))[state["how"]]
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line[:part])
        raise Kill

    def replacing(self, target):
        if not count():
            return replace(self, target)
        if state["how"] == 2:
            replace(self, target)
        raise Kill

    monkeypatch.setattr(Records, "add", adding)
    monkeypatch.setattr(Path, "replace", replacing)

    def start(n):
        state.update(left=n, dead=False, how=n % 3)

    return start


def run_through(kill_at, run):
    """Runs a command that is killed at its first write, then at its second, until it ends.

    Returns: how many runs were killed.
    """
    for n in range(1, 100):
        kill_at(n)
        try:
            run()
        except Kill:
            continue
        return n - 1
    raise AssertionError("it does not get to its end")


def without_times(values):
    if isinstance(values, dict):
        return {k: without_times(v) for k, v in values.items() if k not in OF_TIME}
    return list(map(without_times, values)) if isinstance(values, list) else values


def results(workdir):
    return without_times(read_json(workdir / "results.json"))


@pytest.fixture(scope="module")
def cfg(arithmetic_model, tmp_path_factory):
    """A task of every metric under two policies."""
    path = tmp_path_factory.mktemp("killed") / "records.jsonl"
    records = [
        {"prompt": f"{a}+2=", "answer": f"{a + 2}", "other": "7", "label": 0} for a in range(4)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    data = TaskData(paths=(str(path),), prompt_length=8, answer_length=4)
    choices = TaskData(
        paths=(str(path),), choices=("{answer}", "{other}"), prompt_length=8,
        answer_length=4,
    )  # fmt: skip
    sampler, sums = Confidence(4), ArithmeticData()
    tasks = (
        EvalTask(name="sums", metric="exact_match", data=sums, limit=4, sampler=sampler),
        EvalTask(
            name="code", metric="code", data=data, sampler=sampler, program="assert '{output}'",
            allow_code_execution=True, time_limit=1,
        ),
        EvalTask(name="choice", metric="choice", data=choices, num_samples=4),
        EvalTask(name="nelbo", metric="nelbo", data=data, num_samples=4),
    )  # fmt: skip
    return EvalConfig(
        model=str(arithmetic_model / "model"), tasks=tasks, num_static=(1,), num_random=(),
        batch_size=4, num_calibration=2,
    )  # fmt: skip


def test_a_sweep_of_all_metrics_and_its_comparison(cfg, kill_at, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "load", functools.cache(sweep.load))
    monkeypatch.setattr(sweep_report, "_figures", lambda *args: [])
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    sweep.sweep(cfg, whole)
    assert run_through(kill_at, lambda: sweep.sweep(cfg, killed)) > 6
    assert results(killed) == results(whole)
    names = ("results.json", "results.csv", "results.tex", "report.html", "runs.jsonl")
    assert all((killed / name).exists() for name in names)
    assert not list(killed.glob("*.tmp")) and not (killed / "runs.odd.jsonl").exists()
    kill_at(-1)
    before = (killed / "runs.jsonl").read_bytes()
    sweep.sweep(cfg, killed)  # nothing is measured again
    assert (killed / "runs.jsonl").read_bytes() == before

    out, other = tmp_path / "out", tmp_path / "other"
    compare_sweeps([str(whole), str(killed)], holm=True, out=str(other))
    assert run_through(
        kill_at, lambda: compare_sweeps([str(whole), str(killed)], holm=True, out=str(out))
    )
    for name in ("comparison.csv", "comparison.json"):
        assert (out / name).read_bytes() == (other / name).read_bytes()
