"""A table of pods, and one line about what does not fit; what is compiled: `tests/pods`."""

import json

import jax
import pytest

from benchmarks import command, pod
from dials_jax.pods import topology

CONFIG = """
from dials_jax.config import ArithmeticData, OptimizerConfig, TrainConfig
from dials_jax.models.families import llada_small

def get_config():
    model = llada_small(1, 32, 64, mask_id=63, eos_id=1, pad_id=0, max_length=32)
    data, optimizer = ArithmeticData(num_items=20), OptimizerConfig(num_steps=2, warmup_steps=1)
    return TrainConfig(model=model, data=data, optimizer=optimizer, batch_size=4)
"""


@pytest.fixture(autouse=True)
def quietly(monkeypatch):
    """No compilation cache is set up in the process of the tests."""
    monkeypatch.setattr(command, "keep_programs", lambda: None)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    return ["--config", str(path)]


@pytest.fixture
def on_this_machine(monkeypatch):
    monkeypatch.setattr(pod, "tpu_devices", lambda topology, slices: jax.devices()[:1])


def test_it_prints_and_writes_a_row_per_topology(config, on_this_machine, tmp_path, capsys):
    path = tmp_path / "out.json"
    arguments = [*config, "--length", "16", "--topology", "a", "b", "--out", str(path)]
    assert pod.main([*arguments, "--batch-size", "2"]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["topology"] for row in rows] == ["a", "b"]
    assert all(row["batch"] == 2 and 0 < row["kept_gb"] < row["peak_gb"] for row in rows)
    assert len(capsys.readouterr().out.splitlines()) == 4


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: Ran out of memory. Used 20.50G of 15.75G hbm. Exceeded by 4.75G.",
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
        "required for HLO temporaries (20.50G) exceeds available HBM (15.75G).",
    ],
)
def test_what_does_not_fit_is_a_row_too(message, config, on_this_machine, monkeypatch, capsys):
    def refuse(self):
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    assert pod.main([*config, "--length", "16", "--topology", "a", "b"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("does not fit: it needs 22.01 GB and has 16.91; dials train") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--length", "16"], "the TPU compiler is missing; install it with"),
        (["--length", "16", "--model", "llada_9b"], "model 'llada_9b' is not known; did you mean"),
        (["--length", "16", "--backbone", "x"], "model 'x' is not known"),
        (["--length", "16", "--batch-sise", "2"], "Unrecognized options: --batch-sise"),
    ],
)
def test_bad_input_gives_one_line(config, arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    assert pod.main([*config, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1


def test_routers_need_the_shape_of_their_model(tmp_path, capsys):
    path = tmp_path / "config.py"
    path.write_text(CONFIG.replace("model=model", 'backbone="models/x"'))
    assert pod.main(["--config", str(path), "--length", "16"]) == 2
    assert "name its shape with --backbone" in capsys.readouterr().err
