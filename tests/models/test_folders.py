"""A saved model comes back bit for bit, or not at all."""

import dataclasses
import errno
import json
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dials_jax import digests, stored, trees
from dials_jax.errors import InputError
from dials_jax.files import read_json
from dials_jax.loading import load
from dials_jax.models import families, folders, groups
from dials_jax.models.folders import load_model, save_model
from dials_jax.models.model import Model

CFG = families.llada_small(
    2,
    32,
    vocab_size=40,
    mask_id=39,
    eos_id=0,
    pad_id=1,
    qkv_bias=True,
    o_bias=True,
    mlp_bias=True,
    head_bias=True,
)


@pytest.fixture(scope="module")
def params():
    """Distinct float32 values everywhere, biases included; layers stacked."""
    rng = np.random.default_rng(0)
    shapes = groups.abstract_params(CFG)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), shapes)


@pytest.fixture(scope="module")
def saved(params, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_model(folder, CFG, params)
    return folder


@pytest.fixture
def damaged(saved, tmp_path):
    """A copy to damage."""
    return shutil.copytree(saved, tmp_path / "model")


def unrolled(params):
    return params | {"layers": trees.unstack(params["layers"])}


def assert_same_bits(a, b):
    chex.assert_trees_all_equal(a, b)
    assert jax.tree.map(lambda x: x.dtype, a) == jax.tree.map(lambda x: x.dtype, b)


# ------------------------------------------------------------------------------- round trips


def test_either_layout_loads_what_stacked_layers_saved(params, saved):
    assert_same_bits(load_model(saved, layout="stacked").params, params)
    assert_same_bits(load_model(saved, layout="unrolled").params, unrolled(params))


def test_unrolled_layers_save_the_same_folder(params, saved, tmp_path):
    save_model(tmp_path / "model", CFG, unrolled(params))
    assert folders.read_info(tmp_path / "model") == folders.read_info(saved)
    assert_same_bits(load_model(tmp_path / "model", layout="stacked").params, params)


def test_numpy_views_save_as_their_values(params, tmp_path):
    views = jax.tree.map(lambda x: np.asarray(x).T.copy().T, unrolled(params))
    save_model(tmp_path / "model", CFG, views)
    assert_same_bits(load_model(tmp_path / "model", layout="stacked").params, params)


def test_the_stored_dtype_is_kept_and_another_is_cast_once(params, saved, tmp_path):
    half = trees.cast(params, jnp.bfloat16)
    assert CFG.dtype == "bfloat16"  # of the activations: the weights stay float32
    assert load_model(saved).params["embed"]["table"].dtype == jnp.float32
    assert_same_bits(load_model(saved, "bfloat16", layout="stacked").params, half)
    save_model(tmp_path / "half", CFG, params, dtype="bfloat16")
    assert_same_bits(load_model(tmp_path / "half", layout="stacked").params, half)
    wide = load_model(tmp_path / "half", "float32", layout="stacked")
    assert wide.config == dataclasses.replace(CFG, dtype="float32")
    assert_same_bits(wide.params, trees.cast(half, jnp.float32))


def test_the_folder_records_what_the_model_says_of_itself(params, saved):
    info, model = folders.read_info(saved), Model(CFG, params)
    assert info.model == CFG
    assert info.fingerprint == model.fingerprint == load_model(saved, "bfloat16").fingerprint
    assert info.parameters == trees.count_parameters(params)


# ------------------------------------------------------------------------------- writing


def test_an_interrupted_save_leaves_no_model_and_the_next_one_succeeds(
    params, tmp_path, monkeypatch
):
    def fail(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(digests.Fingerprint, "hex", fail)
        save_model(tmp_path / "model", CFG, params)
    assert not (tmp_path / "model").exists()
    assert not any(map(folders.is_model_folder, tmp_path.iterdir()))
    save_model(tmp_path / "model", CFG, params)
    assert_same_bits(load_model(tmp_path / "model", layout="stacked").params, params)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_an_existing_folder_is_replaced_only_on_request(params, damaged):
    other = jax.tree.map(lambda x: x + 1, params)
    with pytest.raises(InputError, match="exists"):
        save_model(damaged, CFG, other)
    assert_same_bits(load_model(damaged, layout="stacked").params, params)
    save_model(damaged, CFG, other, overwrite=True)
    assert_same_bits(load_model(damaged, layout="stacked").params, other)


def test_a_full_disk_is_an_error_before_anything_is_written(params, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(InputError, match="GB free"):
        save_model(tmp_path / "model", CFG, params)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------- damage


def assert_refused(folder: Path, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        load(folder)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def largest_file(folder: Path) -> Path:
    return max(folder.rglob("d/*"), key=lambda file: file.stat().st_size)


def test_a_flipped_bit_is_found(damaged):
    file = largest_file(damaged / "params" / "head")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert_refused(damaged, "params/head")


def test_exchanged_layers_are_found(damaged):
    layers = damaged / "params" / "layers"
    (layers / "000").rename(layers / "x")
    (layers / "001").rename(layers / "000")
    (layers / "x").rename(layers / "001")
    assert_refused(damaged, "params/layers/000", "damaged")


def test_a_missing_group_is_named(damaged):
    shutil.rmtree(damaged / "params" / "layers" / "001")
    assert_refused(damaged, "params/layers/001", "missing")


def test_a_truncated_file_is_named(damaged):
    file = largest_file(damaged / "params" / "embed")
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    assert_refused(damaged, "params/embed")


def edit_config(folder, change):
    file = folder / "config.json"
    values = read_json(file)
    change(values)
    file.write_text(json.dumps(values))


def test_a_configuration_of_another_shape_is_refused(damaged):
    edit_config(damaged, lambda v: v["model"].update(vocab_size=CFG.vocab_size + 1))
    assert_refused(damaged, "params/embed")


def test_a_configuration_field_that_is_misspelt_names_the_right_one(damaged):
    edit_config(damaged, lambda v: v["model"].update(rope_teta=1.0))
    assert_refused(damaged, "'rope_teta'", "'rope_theta'")


def test_a_version_from_the_future_is_refused(damaged):
    edit_config(damaged, lambda v: v.update(version=2))
    assert_refused(damaged, "version 2")


# ------------------------------------------------------------------------------- load


def test_a_workdir_loads_the_model_inside(damaged, params):
    (damaged.parent / "config.json").write_text(json.dumps({"model": {"model_type": "llada"}}))
    model = load(damaged.parent)
    assert model.path == str(damaged)
    assert_same_bits(load(damaged.parent, layout="stacked").params, params)


def test_other_paths_and_arguments_are_refused(damaged, tmp_path):
    assert_refused(tmp_path / "nowhere", "nowhere", "not a folder")
    (tmp_path / "empty").mkdir()
    assert_refused(tmp_path / "empty", "holds no model")
    with pytest.raises(InputError, match="float16"):
        load(damaged, "float16")


# ------------------------------------------------------------------------------- whose folder


@pytest.mark.parametrize("name", ["model", "model.unfinished"])
@pytest.mark.parametrize("content", ["thesis.txt", "params/thesis.txt", "params/embed.d/../deep/x"])
def test_a_folder_that_no_save_made_is_neither_replaced_nor_removed(
    name, content, params, tmp_path
):
    foreign = (tmp_path / name / content).resolve()
    foreign.parent.mkdir(parents=True)
    foreign.write_text("years of work")
    with pytest.raises(InputError, match=rf"{name} .*; move it away"):
        save_model(tmp_path / "model", CFG, params, overwrite=True)
    assert foreign.read_text() == "years of work" and len(list(tmp_path.iterdir())) == 1


def test_a_link_to_another_model_is_not_replaced(damaged, params, tmp_path):
    (tmp_path / "link").symlink_to(damaged)
    with pytest.raises(InputError, match="move it away"):
        save_model(tmp_path / "link", CFG, params, overwrite=True)


def test_what_a_stopped_save_left_is_removed(params, tmp_path, monkeypatch):
    """Also of the version that left no mark: groups of parameters alone."""
    write = folders.save_tree

    def stop(folder, *args):
        if folder.name == "final_norm":
            raise KeyboardInterrupt
        write(folder, *args)

    unfinished = tmp_path / "model.unfinished"
    for mark in (True, False):
        monkeypatch.setattr(folders, "save_tree", stop)
        with pytest.raises(KeyboardInterrupt):
            save_model(tmp_path / "model", CFG, params, overwrite=True)
        monkeypatch.undo()
        assert (unfinished / folders.MARK).exists()
        if not mark:
            (unfinished / folders.MARK).unlink()
            (unfinished / "tokenizer.json").touch()
        save_model(tmp_path / "model", CFG, params, overwrite=True)
        assert not unfinished.exists()
        assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["config.json", "params"]


def test_a_full_disk_ends_in_a_line(params, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stored.ocp, "save", fail)
    with pytest.raises(InputError, match=r"embed could not be written \(No space left"):
        save_model(tmp_path / "model", CFG, params)


def test_an_address_of_another_file_system_is_no_folder(params, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="gs://bucket/model is no local path"):
        save_model("gs://bucket/model", CFG, params)
    assert list(tmp_path.iterdir()) == []
