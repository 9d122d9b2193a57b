"""Meshes of 8 devices give what one device gives."""

import os
import subprocess
import sys
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
MESHES = ("data8", "data2_fsdp4", "data2_fsdp2_tensor2")
KINDS = (
    *("digest", "fingerprint", "model", "router", "evaluation", "partitioned", "lookup"),
    *("kernel", "layouts"),
)
# Where no weights are gathered, they are taken out of a stack within the branches.
CASES = [*product(MESHES, KINDS), ("data2_tensor2", "evaluation")]


@pytest.fixture(scope="module")
def results(made_once):
    """`results(mesh)`: arrays by name, from a process with 8 fake CPU devices."""

    def make(folder):
        names = dict.fromkeys(["one", *(mesh for mesh, _ in CASES)])
        command = [sys.executable, str(HERE / "mesh_worker.py"), str(folder), *names]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stderr[-3000:]

    folder = made_once("mesh", make)
    return cache(lambda mesh: dict(np.load(folder / f"{mesh}.npz")))


@pytest.mark.parametrize("mesh, kind", CASES)
def test_mesh_equals_one_device(results, mesh, kind):
    one = {
        name: x
        for name, x in results("one").items()
        if name.startswith(kind) and not name.endswith("/whole")
    }
    assert one, "nothing to compare"
    for name, expected in one.items():
        actual = results(mesh)[name]
        if expected.dtype.kind == "f":
            np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5, err_msg=name)
        else:
            np.testing.assert_array_equal(actual, expected, err_msg=name)


@pytest.mark.parametrize("mesh", MESHES)
def test_weights_in_8_bits_are_multiplied_alike_on_all_meshes(results, mesh):
    """But for inputs that the order of a sum has moved over the edge between two roundings."""
    for name in ("eight_bits/full", "eight_bits/routed"):
        one, actual = results("one")[name], results(mesh)[name]
        error = np.abs(actual - one) / one.std()
        assert np.median(error) < 1e-5 and error.max() < 0.05, name


@pytest.mark.parametrize("kind", ["model", "router"])
def test_no_device_holds_the_hidden_states_of_the_whole_batch(results, kind):
    """On a pod they would not fit."""
    held = {mesh: int(results(mesh)[f"{kind}/whole"]) for mesh in MESHES}
    assert results("one")[f"{kind}/whole"] > 0 and not any(held.values()), held


@pytest.mark.parametrize("mesh", ("one", *MESHES))
def test_weights_that_are_saved_are_those_of_that_moment(results, mesh):
    found = results(mesh)
    names = [name.removeprefix("digest/") for name in found if name.startswith("digest/")]
    assert names
    for name in names:
        np.testing.assert_array_equal(found[f"saved/{name}"], found[f"digest/{name}"], err_msg=name)


def test_rows_and_shards_really_differ(results):
    """Otherwise the comparison above would not see compaction at all."""
    for name in ("gates", "cached/dual/gates", "cached/skip/gates"):
        gates = results("one")[f"evaluation/{name}"]  # [steps, L, B]
        assert 0.2 < gates.mean() < 0.95
        assert (gates != gates[..., :1]).any()
    assert 0.05 < results("one")["router/values/skip_rate"] < 0.95


def test_what_a_step_sends_is_read_from_its_program(results):
    """Split weights are gathered twice in a step, of every layer for both microbatches, and the
    gradients of those that are not split are summed; one device sends nothing."""
    sent = {
        mesh: {name.partition("/")[2]: float(x) for name, x in found.items() if "sent/" in name}
        for mesh, found in ((mesh, results(mesh)) for mesh in ("one", *MESHES))
    }
    params = {name: x for name, x in results("one").items() if name.startswith("model/params/")}
    split = sum(x.nbytes for name, x in params.items() if "layers" in name and "norm" not in name)
    every = sum(x.nbytes for x in params.values())
    assert sent["one"] == {}
    assert sent["data8"].get("all-gather", 0) < split / 8 < split < sent["data8"]["all-reduce"]
    assert every * 2 * 7 / 8 <= sent["data8"]["all-reduce"] < 2.2 * every * 2 * 7 / 8
    assert 2 * 2 * split * 3 / 4 <= sent["data2_fsdp4"]["all-gather"] < 2.5 * 2 * split
    assert sent["data2_fsdp2_tensor2"]["all-gather"] < sent["data2_fsdp4"]["all-gather"]
