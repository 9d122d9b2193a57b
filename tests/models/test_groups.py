"""Fused layers are the same model: weights, results, names and files."""

import chex
import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from dials_jax import sharding, trees
from dials_jax.errors import InputError
from dials_jax.models import folders, groups
from dials_jax.models.folders import load_model, save_model
from dials_jax.models.model import Model
from dials_jax.nn import fusing
from dials_jax.nn.modules import form_of
from dials_jax.sampling.confidence import Confidence
from dials_jax.sampling.generate import generate
from tests.conftest import small_config

LAYOUTS = ["stacked", "unrolled", "fused"]
# Two query heads share a key head, and every product has a bias.
CFG = small_config(
    num_layers=2, num_kv_heads=2, qkv_bias=True, o_bias=True, mlp_bias=True, head_bias=True
)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    shapes = groups.abstract_params(CFG)
    return jax.tree.map(lambda x: 0.3 * rng.normal(size=x.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def models(params):
    return {layout: Model(CFG, groups.place(CFG, params, layout=layout)) for layout in LAYOUTS}


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("parts", [1, 2])
def test_layers_come_apart_as_they_were(params, biased, parts):
    layer = trees.layer_slice(params["layers"], 1)
    if not biased:
        for module, arrays in layer.items():
            layer[module] = {k: x for k, x in arrays.items() if not k.endswith("_bias")}
    fused = fusing.fuse(layer, parts)
    assert not {"q", "k", "v"} & fused["attention"].keys() and "gate" not in fused["mlp"]
    back = fusing.unfuse(fused, CFG, parts)
    assert jax.tree.structure(back) == jax.tree.structure(layer)
    chex.assert_trees_all_equal(back, layer)


def test_all_layouts_give_the_same_logits_and_tokens(models):
    tokens = np.random.default_rng(1).integers(2, 60, (2, 6))
    valid = np.arange(6) >= np.array([0, 2])[:, None]
    expected = models["stacked"].apply(tokens, valid).logits
    sampler = Confidence(gen_length=4, block_length=4, steps=4)
    answer = generate(models["stacked"], tokens, valid, sampler=sampler).tokens
    assert "qkv" in models["fused"].params["layers"][0]["attention"]
    assert {k: form_of(m.params).fused for k, m in models.items()} == {
        "stacked": 0, "unrolled": 0, "fused": 1,
    }  # fmt: skip
    for layout in ("unrolled", "fused"):
        logits = models[layout].apply(tokens, valid).logits
        np.testing.assert_allclose(logits[valid], expected[valid], atol=1e-5)
        out = generate(models[layout], tokens, valid, sampler=sampler).tokens
        np.testing.assert_array_equal(out, answer)


def test_all_layouts_have_one_fingerprint(models):
    assert len({model.fingerprint for model in models.values()}) == 1


def test_all_layouts_save_the_same_folder(models, tmp_path):
    for layout, model in models.items():
        save_model(tmp_path / layout, CFG, model.params)
    stacked = load_model(tmp_path / "stacked", layout="stacked").params
    for layout in ("unrolled", "fused"):
        assert folders.read_info(tmp_path / layout) == folders.read_info(tmp_path / "stacked")
        again = load_model(tmp_path / layout, layout="stacked").params
        chex.assert_trees_all_equal(again, stacked)
    fused = load_model(tmp_path / "stacked", layout="fused").params
    chex.assert_trees_all_equal(fused, models["fused"].params)


def test_heads_that_devices_cannot_share_equally_are_not_fused(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for parts in (2, 3):
        mesh = Mesh(np.array(parts * jax.devices()[:1]).reshape(1, 1, parts), sharding.AXES)
        assert groups.chosen_layout("unrolled", mesh, CFG) == "unrolled"
        assert groups.chosen_layout("auto", mesh, CFG) == ("fused" if parts == 2 else "unrolled")
    with pytest.raises(InputError, match=r"equally many heads.*tensor=3.*'unrolled'") as info:
        groups.chosen_layout("fused", mesh, CFG)
    assert "\n" not in str(info.value)
