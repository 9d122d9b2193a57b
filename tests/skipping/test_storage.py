"""Routers come back as they were, and only to the model they were trained on."""

import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dials_jax import trees
from dials_jax.config import RouterConfig
from dials_jax.errors import InputError
from dials_jax.files import read_json
from dials_jax.loading import load
from dials_jax.models.model import Model
from dials_jax.skipping.routed import apply_router
from dials_jax.skipping.storage import load_router, router_facts, save_router
from tests.conftest import jitted_init_routers

CFG = RouterConfig(d_hidden=8, skip_threshold=0.25, execute_bias=0.0)


@pytest.fixture(scope="module")
def backbone(arithmetic_model):
    return load(arithmetic_model)


@pytest.fixture(scope="module")
def router_params(backbone):
    cfg = backbone.config
    routers = jitted_init_routers(cfg.d_model, cfg.num_layers, CFG, jax.random.key(0))
    return {**routers, "vote": jax.random.normal(jax.random.key(1), routers["vote"].shape)}


@pytest.fixture
def workdir(tmp_path, router_params, backbone):
    save_router(tmp_path / "run" / "router", router_params, CFG, backbone, skip_weight=0.5)
    return tmp_path / "run"


@pytest.mark.parametrize("inside", ["", "router"])  # the workdir, or the folder itself
def test_routers_come_back_bitwise(inside, workdir, router_params, backbone):
    policy = load_router(workdir / inside, backbone)
    chex.assert_trees_all_equal(policy.router, router_params)
    assert policy.threshold == 0.25
    assert router_facts(workdir / inside)[1].skip_weight == 0.5


def test_a_deeper_router_comes_back_and_votes_as_its_layers_say(backbone, tmp_path):
    """Two more linear layers with SiLU between, by hand."""
    cfg = RouterConfig(d_hidden=8, depth=4, execute_bias=0.0)
    shape = backbone.config.d_model, backbone.config.num_layers
    routers = jitted_init_routers(*shape, cfg, jax.random.key(0))
    routers["vote"] = jax.random.normal(jax.random.key(1), routers["vote"].shape)
    save_router(tmp_path / "router", routers, cfg, backbone, skip_weight=0.5)
    policy = load_router(tmp_path / "router", backbone)
    chex.assert_trees_all_equal(policy.router, routers)
    one = jax.tree.map(lambda x: np.asarray(x)[2], routers)
    h = np.asarray(jax.random.normal(jax.random.key(2), (2, 9, shape[0])))
    x = h / np.sqrt((h**2).mean(-1, keepdims=True) + 1e-5)
    x = jax.nn.silu(x @ one["down"])
    for kernel in one["inner"]:
        x = jax.nn.silu(x @ kernel)
    np.testing.assert_allclose(jax.jit(apply_router)(one, h), x @ one["vote"], atol=1e-5)
    inner = 2 * one["inner"].size  # FLOPs of the two more layers
    assert policy.flops(backbone.config, 1) == 2 * (one["down"].size + one["vote"].size) + inner
    with pytest.raises(InputError, match="depth=1 linear layers: a router has at least 2"):
        RouterConfig(depth=1)


def test_routers_are_laid_out_as_the_layers(workdir, router_params, arithmetic_model):
    policy = load_router(workdir, load(arithmetic_model, layout="unrolled"))
    assert trees.is_unrolled(policy.router)
    chex.assert_trees_all_equal(trees.stack(policy.router), router_params)


def test_a_router_of_a_bfloat16_model_votes_as_before(workdir, router_params, arithmetic_model):
    policy = load_router(workdir, load(arithmetic_model, "bfloat16"))
    assert policy.router["down"].dtype == jnp.bfloat16
    assert policy.router["vote"].dtype == jnp.float32
    h = jax.random.normal(jax.random.key(2), (2, 9, 32)).astype(jnp.bfloat16)
    for layer in range(4):
        loaded, saved = (
            apply_router(trees.layer_slice(x, layer), h) for x in (policy.router, router_params)
        )
        np.testing.assert_array_equal(loaded, saved)


def test_saving_again_replaces(workdir, router_params, backbone):
    doubled = jax.tree.map(lambda x: 2 * x, router_params)
    save_router(workdir / "router", doubled, CFG, backbone, skip_weight=0.7)
    policy = load_router(workdir, backbone)
    np.testing.assert_array_equal(policy.router["vote"], doubled["vote"])
    assert router_facts(workdir)[1].skip_weight == 0.7


def test_a_threshold_overrides_the_one_of_training(workdir, backbone):
    assert load_router(workdir, backbone, threshold=0.0).threshold == 0
    with pytest.raises(InputError, match=r"threshold=1\.5"):
        load_router(workdir, backbone, threshold=1.5)


def test_thresholds_per_layer_and_votes_override_those_of_training(workdir, backbone):
    policy = load_router(workdir, backbone, threshold=(0.1, 0.2, 0.3, 0.4), votes="soft")
    np.testing.assert_array_equal(policy.threshold, np.float32([0.1, 0.2, 0.3, 0.4]))
    assert policy.votes == "soft" and load_router(workdir, backbone).votes == "hard"


def test_the_folder_of_an_earlier_version_is_loaded(workdir, backbone):
    """One that knows neither votes, nor annealing, nor fitted thresholds."""
    file = workdir / "router" / "config.json"
    facts = read_json(file)
    del facts["fitted"], facts["router"]["votes"], facts["router"]["anneal_steps"]
    file.write_text(json.dumps(facts))
    policy = load_router(workdir, backbone)
    assert (policy.threshold, policy.votes) == (0.25, "hard")
    assert router_facts(workdir)[1].fitted == ()


def test_the_router_of_another_backbone_is_refused(workdir, backbone, other_model):
    other = load(other_model)
    with pytest.raises(InputError, match="belongs to another backbone") as error:
        load_router(workdir, other)
    assert backbone.fingerprint in str(error.value) and other.fingerprint in str(error.value)


@pytest.mark.parametrize("name", ["embed/table", "layers/mlp/down", "head/kernel"])
def test_one_other_element_makes_another_backbone(workdir, backbone, name):
    def change(path, x):
        return x.at[(-1,) * x.ndim].add(1.0) if path == name else x

    other = Model(backbone.config, trees.map_named(change, backbone.params))
    with pytest.raises(InputError, match="belongs to another backbone"):
        load_router(workdir, other)


def test_a_router_of_a_version_before_is_loaded_with_a_warning(
    workdir, backbone, other_model, caplog
):
    file = workdir / "router" / "config.json"
    facts = read_json(file)
    facts["backbone_fingerprint"] = backbone.fingerprint[:16]
    file.write_text(json.dumps(facts))
    load_router(workdir, backbone)
    (record,) = caplog.records
    assert str(workdir) in record.getMessage() and "earlier version" in record.getMessage()
    with pytest.raises(InputError, match="belongs to another backbone"):
        load_router(workdir, load(other_model))


def test_what_is_no_router_is_refused(arithmetic_model, tmp_path):
    with pytest.raises(InputError, match="holds no router"):
        router_facts(tmp_path)
    with pytest.raises(InputError, match="is not a router but 'dials_jax model'"):
        router_facts(arithmetic_model / "model")


def test_a_flipped_bit_is_seen(workdir, backbone):
    files = [p for p in (workdir / "router" / "params").rglob("*") if p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(bytes(content))
    with pytest.raises(InputError, match="run its training command again"):
        load_router(workdir, backbone)


def test_missing_arrays_are_one_error(workdir, backbone):
    shutil.rmtree(workdir / "router" / "params")
    with pytest.raises(InputError, match="cannot be read"):
        load_router(workdir, backbone)


def test_a_folder_that_is_no_router_is_not_written_into(router_params, backbone, tmp_path):
    for name, content in (("thesis.txt", ""), ("config.json", '{"model_type": "llada"}')):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text(content)
        with pytest.raises(InputError, match=r"is no dials_jax router .*; move it away"):
            save_router(folder, router_params, CFG, backbone, skip_weight=0.5)
        assert [path.name for path in folder.iterdir()] == [name]


def test_a_router_and_what_a_stopped_save_left_of_one_are_replaced(
    workdir, router_params, backbone
):
    for stopped in (False, True):
        if stopped:
            (workdir / "router" / "config.json").unlink()
        save_router(workdir / "router", router_params, CFG, backbone, skip_weight=0.7)
        assert router_facts(workdir)[1].skip_weight == 0.7
