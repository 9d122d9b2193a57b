"""The step that is compiled for a pod is the loop's own, and what does not fit gives one line."""

import dataclasses
import json

import jax
import pytest

from benchmarks import command, pod
from dials_jax import sharding
from dials_jax.config import OptimizerConfig, RouterConfig
from dials_jax.data.batches import batch_at
from dials_jax.training.loop import train
from dials_jax.training.run import prepare_run
from tests.conftest import small_config

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
    monkeypatch.setattr(pod, "devices_of", lambda topology, slices: jax.devices()[:1])


def num_bytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("changes", [{}, {"layout": "unrolled"}, {"num_microbatches": 2}])
def test_what_is_kept_is_what_training_keeps(changes, train_config, tmp_path):
    optimizer = OptimizerConfig(num_steps=2, warmup_steps=1, ema=0.9)
    cfg = train_config(optimizer=optimizer, **changes)
    state, mesh = train(cfg, tmp_path), sharding.make_mesh(cfg.mesh)
    data = prepare_run(cfg, mesh).data
    batch = batch_at(data, 0, 0, cfg.batch_size)
    found = pod.compile_footprint(cfg, mesh, batch.tokens.shape[1])
    # Rows without padding bring no array that says so, and one device needs no collective.
    expected = num_bytes(state) + num_bytes(batch._replace(valid=None))
    assert found.kept == pytest.approx(expected, abs=64)
    assert found.peak > found.kept and found.largest_collective == 0


def test_routers_keep_little_beside_their_model(train_config):
    cfg = train_config(backbone="anywhere", router=RouterConfig(d_hidden=8))
    backbone = small_config(dtype="bfloat16")
    mesh = sharding.make_mesh()
    routers = pod.compile_footprint(cfg, mesh, 16, backbone)
    model = pod.compile_footprint(dataclasses.replace(cfg, model=backbone, backbone=""), mesh, 16)
    assert routers.kept < model.kept / 3  # two bytes a parameter, not twelve


def test_the_largest_collective_is_found():
    program = """
      %a = f32[64,1000]{1,0} fusion(%x), kind=kLoop
      %b = (bf16[8,16]{1,0:T(8,128)}, f32[4,16]{1,0}) all-gather-start(%y), dimensions={0}
      ROOT %c = f32[10]{0} all-reduce(%z), to_apply=%sum
    """
    assert pod.read_largest_collective(program) == 2 * 8 * 16
    assert pod.read_largest_collective("%a = f32[3]{0} add(%x, %y)") == 0


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
    def refuse(*args):
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(pod, "compile_footprint", refuse)
    assert pod.main([*config, "--length", "16", "--topology", "a", "b"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("does not fit: it needs 20.50 GiB and has 15.75; try --remat") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--length", "16"], "the TPU compiler is missing; install it with"),
        ([], "--length is missing: the rows of this data have no fixed one"),
        (["--length", "16", "--model", "llada_9b"], "model 'llada_9b' is not known; did you mean"),
        (["--length", "16", "--backbone", "x"], "model 'x' is not known"),
        (["--length", "16", "--batch-sise", "2"], "Unrecognized options: --batch-sise"),
    ],
)
def test_bad_input_gives_one_line(config, arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(pod.importlib.util, "find_spec", lambda name: None)
    assert pod.main([*config, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1


def test_routers_need_the_shape_of_their_model(tmp_path, capsys):
    path = tmp_path / "config.py"
    path.write_text(CONFIG.replace("model=model", 'backbone="models/x"'))
    assert pod.main(["--config", str(path), "--length", "16"]) == 2
    assert "name its shape with --backbone" in capsys.readouterr().err
