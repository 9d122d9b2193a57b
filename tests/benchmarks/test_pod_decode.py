"""A table of caches and policies; what is compiled: `tests/pods`."""

import json

import jax
import pytest

from benchmarks import command, pod_decode
from benchmarks.random_model import make_config, make_model
from dials_jax.pods import topology

TINY = ["--model", "tiny", "--layers", "2", "--prompt", "4", "--gen", "8", "--block", "4"]


@pytest.fixture(autouse=True)
def on_this_machine(monkeypatch):
    monkeypatch.setattr(command, "keep_programs", lambda: None)
    monkeypatch.setattr(pod_decode, "tpu_devices", lambda topology: jax.devices()[:1])


def test_it_prints_and_writes_a_row_per_case(tmp_path, capsys):
    path = tmp_path / "out.json"
    arguments = [*TINY, "--caches", "none", "dual", "--policies", "full", "routed-1", "static-1"]
    assert pod_decode.main([*arguments, "--out", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(row["cache"], row["policy"]) for row in rows][1:4] == [
        ("none", "routed-1"),
        ("none", "static-1"),
        ("dual", "full"),
    ]
    weights = make_model(make_config("tiny", 2)).inference_params
    kept = sum(x.nbytes for x in jax.tree.leaves(weights)) / 1e9
    assert all(row["peak_gb"] > row["kept_gb"] >= kept for row in rows)
    assert rows[1]["kept_gb"] > rows[0]["kept_gb"]  # routers
    assert len(capsys.readouterr().out.splitlines()) == 8


def test_weights_in_8_bits_are_compiled_so(tmp_path):
    path = tmp_path / "out.json"
    arguments = [*TINY, "--caches", "none", "--policies", "full", "--weights", "int8"]
    assert pod_decode.main([*arguments, "--out", str(path)]) == 0
    [row] = json.loads(path.read_text())["rows"]
    weights = make_model(make_config("tiny", 2), weights="int8").inference_params
    whole = make_model(make_config("tiny", 2)).inference_params
    eight, half = (sum(x.nbytes for x in jax.tree.leaves(x)) / 1e9 for x in (weights, whole))
    assert eight <= row["kept_gb"] < half


def test_what_does_not_fit_is_a_row_too(monkeypatch, capsys):
    def refuse(self):
        raise jax.errors.JaxRuntimeError("Ran out of memory. Used 20.5G of 15.75G hbm.")

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    assert pod_decode.main([*TINY, "--caches", "none", "dual"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("does not fit: it needs 22.01 GB and has 16.91; try a larger --tensor") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policies", "rooted"], "policy 'rooted' is not known; did you mean"),
        (["--caches", "duel"], "cache 'duel' is not known"),
        (["--tensor", "3"], "mesh data=-1 fsdp=1 tensor=3 does not fit 1 devices"),
        (["--model", "llada_9b"], "model 'llada_9b' is not known; did you mean"),
    ],
)
def test_bad_input_gives_one_line(arguments, message, capsys):
    assert pod_decode.main([*TINY, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1


def test_the_compiler_is_needed(monkeypatch, capsys):
    monkeypatch.setattr(pod_decode, "tpu_devices", topology.tpu_devices)
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    assert pod_decode.main(TINY) == 2
    assert "the TPU compiler is missing; install it with" in capsys.readouterr().err
