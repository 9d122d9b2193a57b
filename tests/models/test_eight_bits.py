"""Models in 8 bits: quantised as they are loaded or stored so, and what refuses them."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import dials_jax as dj
from dials_jax import trees
from dials_jax.config import RouterConfig, TrainConfig
from dials_jax.errors import InputError
from dials_jax.estimates import device_bytes
from dials_jax.files import read_json, write_json
from dials_jax.models import families
from dials_jax.models.folders import (
    CHUNK_BYTES,
    group_digest,
    read_info,
    save_model,
    stored_shapes,
)
from dials_jax.models.model import Model
from dials_jax.nn.eight_bits import dequantise_modules, is_quantised
from dials_jax.skipping.storage import load_router, save_router
from dials_jax.stored import save_tree
from dials_jax.training.run import prepare_run
from tests.conftest import random_routers
from tests.convert.conftest import main as convert

GOLDEN = Path(__file__).parents[1] / "golden"
SOURCE = GOLDEN / "llada_tiny"
KINDS = ("int8", "fp8")


@pytest.fixture(scope="module")
def plain():
    return dj.load(SOURCE)


@pytest.fixture(scope="module")
def loaded():
    return {kind: dj.load(SOURCE, weights=kind) for kind in KINDS}


@pytest.fixture(scope="module")
def stored(made_once):
    def make(folder):
        assert all(convert([str(SOURCE), str(folder / x), "--weights", x]) == 0 for x in KINDS)

    return made_once("stored in 8 bits", make)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize("kind", KINDS)
def test_stored_weights_are_those_quantised_at_load(plain, loaded, stored, kind):
    found = dj.load(stored / kind)
    assert_same(found.params, loaded[kind].params)
    assert_same(dj.load(stored / kind, weights=kind, layout="unrolled").params["layers"][2],
                trees.layer_slice(found.params["layers"], 2))  # fmt: skip
    for other in ("embed", "final_norm"):
        assert_same(found.params[other], plain.params[other])
    assert is_quantised(found.params["head"]["kernel"])
    assert found.weights == kind == read_info(stored / kind).weights
    assert found.fingerprint == loaded[kind].fingerprint == f"{plain.fingerprint}-{kind}-head"
    assert found.source_fingerprint == plain.fingerprint
    assert f"weights in {kind}" in repr(found)
    assert found.num_parameters == plain.num_parameters


def test_weights_in_bfloat16_and_in_float32_give_the_same(loaded):
    half = dj.load(SOURCE, "bfloat16", weights="int8")
    layer = trees.layer_slice(loaded["int8"].params["layers"], 0)
    assert_same(trees.layer_slice(half.params["layers"], 0)["mlp"], layer["mlp"])
    assert half.params["layers"]["mlp_norm"]["scale"].dtype == "bfloat16"


@pytest.mark.parametrize("part", ["layers", "head"])
def test_layers_and_head_take_half_of_bfloat16(loaded, part):
    both = (dj.load(SOURCE, "bfloat16", weights=x) for x in (None, "fp8"))
    half, eight = (device_bytes(model.params[part]) for model in both)
    leaves = jax.tree.leaves(loaded["fp8"].params[part], is_leaf=is_quantised)
    scales = sum(x.scales.nbytes for x in leaves if is_quantised(x))
    assert eight - scales < 0.51 * half


@pytest.mark.parametrize("family", [families.llada_8b, families.dream_7b])
def test_weights_of_published_shapes_take_little_more_than_half(family):
    cfg = family()
    sizes = [num_bytes(stored_shapes(cfg, "bfloat16", weights)) for weights in (None, "int8")]
    assert 0.5 < sizes[1] / sizes[0] < 0.55  # the embedding stays as it is


def num_bytes(shapes):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))


@pytest.mark.parametrize("kind", KINDS)
def test_folders_from_before_the_head_was_quantised_are_read(plain, stored, loaded, kind, tmp_path):
    """Their head is quantised as it is read, as `load` does it: bit by bit what is stored now."""
    old = tmp_path / kind
    shutil.copytree(stored / kind, old)
    shutil.rmtree(old / "params" / "head")
    save_tree(old / "params" / "head", plain.params["head"], "again", CHUNK_BYTES)
    about = read_json(old / "config.json")
    about["digests"]["head"] = group_digest(plain.params["head"])
    del about["head_in_8_bits"]
    write_json(old / "config.json", about, digest=True)
    assert_same(dj.load(old).params, loaded[kind].params)
    assert dj.load(old, layout="unrolled").fingerprint == loaded[kind].fingerprint
    exported = dj.export_model(old, tmp_path / "out", "float32")  # what the folder holds
    assert_same(dj.load(exported).params["head"], plain.params["head"])


def test_a_head_that_was_tied_is_an_array_of_its_own(tmp_path):
    """A tied checkpoint is read with two arrays, of which the embedding stays as it is."""
    source = GOLDEN / "gpt2_tiny"
    plain, int8 = dj.load(source), dj.load(source, weights="int8")
    np.testing.assert_array_equal(plain.params["head"]["kernel"].T, plain.params["embed"]["table"])
    assert_same(int8.params["embed"], plain.params["embed"])
    head = dequantise_modules({"head": int8.params["head"]}, np.float32)["head"]["kernel"]
    step = np.abs(plain.params["head"]["kernel"]).max(axis=0) / 127
    assert (np.abs(head - plain.params["head"]["kernel"]) <= 0.51 * step + 0.004 * step * 127).all()
    exported = dj.export_model(int8, tmp_path / "out", "float32")
    assert_same(dj.load(exported).params["head"], {"kernel": head})


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_near_and_alike_in_all_layouts(plain, loaded, stored, kind):
    tokens = np.random.default_rng(0).integers(1, 60, (2, 12))
    exact, rounded = (np.asarray(x.apply(tokens).logits) for x in (plain, loaded[kind]))
    assert 0 < np.abs(exact - rounded).mean() < {"int8": 0.2, "fp8": 0.6}[kind] * exact.std()
    for layout in ("unrolled", "fused"):
        same = dj.load(stored / kind, layout=layout).apply(tokens).logits
        np.testing.assert_allclose(same, rounded, atol=1e-4 * np.abs(rounded).max())


def test_padding_and_neighbours_change_no_sequence(loaded):
    """Scales per token: a sequence has the values that it has alone."""
    tokens = np.random.default_rng(0).integers(1, 60, (3, 12))
    valid = np.arange(12) >= np.array([0, 4, 7])[:, None]
    together = np.asarray(loaded["int8"].apply(tokens, valid).logits)
    for i, first in enumerate((0, 4, 7)):
        alone = np.asarray(loaded["int8"].apply(tokens[i : i + 1, first:]).logits)[0]
        np.testing.assert_allclose(together[i, first:], alone, atol=1e-4 * np.abs(alone).max())


def test_a_router_serves_its_model_in_8_bits(plain, loaded, stored, tmp_path):
    routers = random_routers(plain.config)
    save_router(tmp_path / "router", routers, RouterConfig(d_hidden=8), plain, 0.1)
    for model in (loaded["int8"], dj.load(stored / "fp8")):
        policy = load_router(tmp_path / "router", model)
        assert_same(policy.router["vote"], load_router(tmp_path / "router", plain).router["vote"])


def test_folders_of_this_library_are_quantised_too(plain, stored, tmp_path):
    save_model(tmp_path / "run" / "model", plain.config, plain.params)
    assert "weights" not in (tmp_path / "run" / "model" / "config.json").read_text()
    assert convert([str(tmp_path / "run"), str(tmp_path / "out"), "--weights", "fp8"]) == 0
    assert_same(dj.load(tmp_path / "out").params, dj.load(stored / "fp8").params)


def test_the_rounded_numbers_are_exported_if_asked_for(stored, loaded, tmp_path):
    for source in (stored / "int8", loaded["int8"]):
        with pytest.raises(InputError, match="no weights in int8; give dtype bfloat16"):
            dj.export_model(source, tmp_path / "out")
    dj.export_model(stored / "int8", tmp_path / "out", "float32")
    again = dj.load(tmp_path / "out", weights="int8")
    values = [m.params["layers"]["attention"]["o"].values for m in (again, loaded["int8"])]
    np.testing.assert_allclose(*np.asarray(values, int), atol=1)


def test_what_weights_in_8_bits_cannot_do(stored, loaded, train_config, tmp_path, capsys):
    def refused(call, message):
        with pytest.raises(InputError, match=message) as info:
            call()
        assert "\n" not in str(info.value)

    refused(lambda: dj.load(SOURCE, weights="fp9"), "weights='fp9'.*did you mean 'fp8'")
    refused(lambda: dj.load(stored / "fp8", weights="int8"), "holds its weights in fp8, not int8")
    int8 = loaded["int8"]
    refused(lambda: save_model(tmp_path / "x", int8.config, int8.params), "in 8 bits already")
    assert convert([str(stored / "fp8"), str(tmp_path / "x"), "--weights", "fp8"]) == 2
    assert "in 8 bits already" in capsys.readouterr().err
    mesh = int8.mesh
    refused(lambda: prepare_run(train_config(stored / "fp8"), mesh), "no gradients")
    assert isinstance(train_config(stored / "fp8"), TrainConfig)
    assert isinstance(int8, Model)


def test_damaged_numbers_and_scales_are_found(stored, tmp_path):
    shutil.copytree(stored / "int8", tmp_path / "int8")
    config = tmp_path / "int8" / "config.json"
    write_json(config, read_json(config) | {"weights": "fp8"}, digest=True)
    with pytest.raises(InputError, match=r"params/head cannot be read"):
        dj.load(tmp_path / "int8")
