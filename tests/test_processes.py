"""Two hosts, each with a device of its own, do what one does."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import dials_jax as dj
from dials_jax.config import MeshConfig
from dials_jax.data.arithmetic import ArithmeticTask
from dials_jax.models.folders import save_model
from tests.conftest import init_params
from tests.process_worker import DATA, END_AFTER, tiny, work

ROOT = Path(__file__).parents[1]
TIME = ("tokens_per_second", "seconds", "digest")  # and digests of lines that hold times


@pytest.fixture(scope="module")
def folders(made_once):
    """What one process left, what two left, and what those printed."""
    left = made_once("processes", run_both)
    return left / "one", left / "two", [(left / f"{n}.txt").read_text() for n in range(2)]


def run_both(folder):
    one, two = folder / "one", folder / "two"
    save_scorer(folder)
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    worker = str(ROOT / "tests" / "process_worker.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    logs = [folder / f"{number}.txt" for number in range(2)]
    with contextlib.ExitStack() as stack:
        processes = [
            subprocess.Popen(
                [sys.executable, worker, str(number), "2", str(port), str(two)],
                env=environment, stdout=stack.enter_context(log.open("w")),
                stderr=subprocess.STDOUT,
            )
            for number, log in enumerate(logs)
        ]  # fmt: skip
        for process in processes:
            stack.callback(process.kill)
        work(one, MeshConfig())
        for process in processes:  # `END_AFTER` ends one that hangs, but not at its very end
            process.wait(2 * END_AFTER)
    ends = "\n".join(f"--- {log.name}\n{log.read_text()[-6000:]}" for log in logs)
    assert [process.returncode for process in processes] == [0, 0], ends


def save_scorer(folder):
    """A causal model, whose perplexity the study takes."""
    ArithmeticTask(DATA).tokenizer.save(folder)
    params, files = init_params(tiny(causal=True)), [folder / "tokenizer.json"]
    save_model(folder / "scorer", tiny(causal=True), params, tokenizer_files=files)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_close(a, b):
    """Equal but for rounding and what was measured in time."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a.keys() - set(TIME):
            assert_close(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_close(x, y)
    elif isinstance(a, float):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5)
    else:
        assert a == b


def test_training_with_split_parameters_is_the_same(folders):
    one, two, _ = folders
    for name in ("model", "router"):
        assert_close(*(lines(folder / name / "metrics.jsonl") for folder in (one, two)))
    models = [dj.load(folder / "model") for folder in (one, two)]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), *(m.params for m in models)
    )


def test_a_sweep_gives_every_item_the_same_score(folders):
    one, two, _ = folders
    runs = [json.loads((x / "sweep" / "results.json").read_text())["runs"] for x in (one, two)]
    assert len(runs[0]) == 6
    for a, b in zip(*runs, strict=True):
        for run in (a, b):  # digests of a router that either folder trained itself
            for name in {"router", "training"} & run["policy"].keys():
                del run["policy"][name]
        for name in ("task", "policy", "items", "examples", "execution"):
            assert_close(a[name], b[name])


def test_a_study_draws_and_writes_every_sample_once(folders):
    one, two, outputs = folders
    assert_close(*(lines(folder / "study" / "runs.jsonl") for folder in (one, two)))
    assert (two / "study" / "results.csv").exists()
    shown = [("gen. PPL" in output, "full: " in output) for output in outputs]
    assert shown == [(True, True), (False, False)]  # the first process speaks for all
