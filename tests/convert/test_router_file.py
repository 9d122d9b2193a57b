"""Routers as one safetensors file, and back, bit by bit."""

import json

import chex
import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from dials_jax.cli.export import export_command
from dials_jax.config import RouterConfig
from dials_jax.convert.router import export_router, import_router
from dials_jax.errors import InputError
from dials_jax.skipping import storage
from dials_jax.skipping.storage import (
    ROUTER_FORMAT,
    FittedThresholds,
    load_router,
    router_facts,
    save_fitted,
    save_router,
)
from tests.conftest import jitted_init_routers
from tests.convert.conftest import main

CFG = RouterConfig(d_hidden=8, depth=3, execute_bias=0.5)
FITTED = FittedThresholds(
    execution_ratio=0.8, votes="soft", thresholds=(0.25,), reached=0.79, num_sequences=8
)


@pytest.fixture(scope="module")
def trained(model):
    shape = model.config.d_model, model.config.num_layers
    routers = jitted_init_routers(*shape, CFG, jax.random.key(0))
    return {**routers, "vote": jax.random.normal(jax.random.key(1), routers["vote"].shape)}


@pytest.fixture
def workdir(tmp_path, trained, model):
    save_router(tmp_path / "run" / "router", trained, CFG, model, skip_weight=1.5)
    save_fitted(tmp_path / "run", FITTED)
    return tmp_path / "run"


def test_a_router_comes_back_with_what_is_known_of_it(workdir, model, trained, tmp_path, capsys):
    file = tmp_path / "router.safetensors"
    export_command([str(workdir), "--out", str(file)])
    assert main([str(file), str(tmp_path / "again")]) == 0
    assert "router, 4 layers of width 32" in capsys.readouterr().out
    assert router_facts(tmp_path / "again")[1] == router_facts(workdir)[1]
    again = load_router(tmp_path / "again", model, execution_ratio=0.8)
    chex.assert_trees_all_equal(again.router, trained)
    assert (again.threshold, again.votes) == (0.25, "soft")


def test_the_file_says_what_it_holds(workdir, model, trained, tmp_path):
    with safe_open(export_router(workdir, tmp_path / "r.safetensors"), framework="numpy") as file:
        about = {name: json.loads(text) for name, text in file.metadata().items()}
        arrays = {name: file.get_tensor(name) for name in file.keys()}
    assert about["backbone_fingerprint"] == model.fingerprint
    assert (about["num_layers"], about["d_model"], about["skip_weight"]) == (4, 32, 1.5)
    assert about["router"]["d_hidden"] == 8 and about["fitted"][0]["reached"] == 0.79
    assert {name: x.shape for name, x in arrays.items()} == {
        "norm.scale": (4, 32), "down": (4, 32, 8), "down_bias": (4, 8), "inner": (4, 1, 8, 8),
        "inner_bias": (4, 1, 8), "vote": (4, 8, 2), "vote_bias": (4, 2),
    }  # fmt: skip
    np.testing.assert_array_equal(arrays["norm.scale"], trained["norm"]["scale"], strict=True)


def test_a_flipped_bit_is_found(workdir, tmp_path):
    file = export_router(workdir, tmp_path / "router.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(InputError, match="is damaged: its arrays do not match"):
        import_router(file, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_folder_is_whole_or_not_there(workdir, tmp_path, monkeypatch):
    file, folder = export_router(workdir, tmp_path / "r.safetensors"), tmp_path / "again"

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(storage, "_write_info", stop)
        import_router(file, folder)
    assert not folder.exists()
    assert import_router(file, folder) == router_facts(folder)[1]
    assert {path.name for path in folder.iterdir()} == {"config.json", "params"}


def test_other_files_and_names_are_refused_in_a_line(workdir, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"r is no name for a router's file; end it with \.safe"):
        export_router(workdir, tmp_path / "r")
    with pytest.raises(InputError, match="--dtype is for models"):
        export_command([str(workdir), "--out", str(tmp_path / "r"), "--dtype", "bfloat16"])
    with pytest.raises(InputError, match="--max-shard-size is for models"):
        export_command([str(workdir), "--out", str(tmp_path / "r"), "--max-shard-size", "5GB"])
    file = export_router(workdir, tmp_path / "router.safetensors")
    with pytest.raises(InputError, match="exists; name another file"):
        export_router(workdir, file)
    with pytest.raises(InputError, match="exists; name another folder"):
        import_router(file, workdir)
    noted = tmp_path / "noted.safetensors"
    about = {"format": json.dumps(ROUTER_FORMAT), "note": "hello"}
    save_file({"x": np.zeros(1, np.float32)}, noted, about)
    with pytest.raises(InputError, match=r"noted\.safetensors: note is not"):
        import_router(noted, tmp_path / "again")
    model = tmp_path / "model.safetensors"
    model.write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(InputError, match="is no router that this library exported"):
        import_router(model, tmp_path / "again")
