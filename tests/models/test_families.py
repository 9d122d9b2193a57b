"""What holds for every family, in every layout and under every policy."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dials_jax import trees
from dials_jax.loading import load
from dials_jax.models import families, groups, transformer
from dials_jax.models.folders import save_model
from dials_jax.models.model import Model
from dials_jax.nn import block, fusing
from dials_jax.sampling.autoregressive import Autoregressive
from dials_jax.sampling.generate import generate
from dials_jax.skipping.policies import Random, Static
from dials_jax.skipping.routed import Routed
from tests.conftest import init_params, random_routers

MASK = 62
SPECIAL = {"vocab_size": 63, "eos_id": 1, "pad_id": 0, "dtype": "float32", "max_length": 32}
TOKENS = np.random.default_rng(0).integers(2, 63, (3, 8))  # [MASK] among them
TOKENS[:, 5:] = MASK
TIME = jnp.array([0.1, 0.5, 1.0])
FAMILIES = {
    "mdlm": families.mdlm_small(3, 32, mask_id=MASK, cond_dim=8, **SPECIAL),
    "timed": families.mdlm_small(
        3, 32, mask_id=MASK, cond_dim=8, time_conditioning=True, **SPECIAL
    ),
    "gpt2": families.gpt2_small(3, 32, mask_id=MASK, **SPECIAL),
}


def random_params(cfg, seed=0):
    """No parameter is zero, as those of adaLN are at first."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: transformer.init(cfg, jax.random.key(0)))
    return trees.map_named(
        lambda name, x: jnp.asarray(
            ("norm/scale" in name) + 0.3 * rng.normal(size=x.shape), jnp.float32
        ),
        shapes,
    )


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    cfg = FAMILIES[request.param]
    return Model(cfg, random_params(cfg))


@pytest.fixture(scope="module")
def policies(model):
    return {
        "static": Static((1,)),
        "random": Random(1),
        "routed": Routed(random_routers(model.config), 0.3),
    }


def in_layout(model, layout):
    params = jax.tree.map(np.asarray, model.params)
    return Model(model.config, groups.place(model.config, params, model.mesh, layout))


# ------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("layout", ["unrolled", "fused"])
def test_layouts_agree(model, layout):
    other, expected = in_layout(model, layout), model.apply(TOKENS, time=TIME).logits
    np.testing.assert_allclose(other.apply(TOKENS, time=TIME).logits, expected, atol=1e-4)
    assert other.fingerprint == model.fingerprint


def test_a_fused_layer_comes_apart_again(model):
    layer = trees.layer_slice(model.params["layers"], 1)
    again = fusing.unfuse(fusing.fuse(layer), model.config)
    chex.assert_trees_all_equal(again, layer)


def test_a_saved_model_is_loaded_bitwise(model, tmp_path):
    save_model(tmp_path / "model", model.config, model.params)
    loaded = load(tmp_path / "model")
    assert loaded.config == model.config
    chex.assert_trees_all_equal(loaded.params, model.params)
    save_model(tmp_path / "fused", model.config, load(tmp_path / "model", layout="fused").params)
    chex.assert_trees_all_equal(load(tmp_path / "fused").params, model.params)


def test_what_is_worked_out_beforehand_changes_no_result(model):
    cfg, tokens = model.config, jnp.asarray(TOKENS, jnp.int32)

    @jax.jit
    def logits(params):
        h = transformer.run_layers(cfg, params, tokens, None, time=TIME).h
        return transformer.predict_logits(cfg, params, h, time=TIME)

    ready = transformer.prepare_for_inference(cfg, model.params)
    np.testing.assert_allclose(logits(ready), logits(model.params), atol=1e-4)
    assert ready["head"]["padded"].shape[1] == block.VOCABULARY_UNIT  # and not 63
    again = transformer.prepare_for_inference(cfg, ready)
    chex.assert_trees_all_equal(again, ready)


# ------------------------------------------------------------------------------------ policies


@pytest.mark.parametrize("name", ["static", "random", "routed"])
def test_policies_skip_as_the_reference_does(model, policies, name):
    keys = jax.random.split(jax.random.key(1), 3)
    out, reference = (
        model.apply(TOKENS, policy=policies[name], time=TIME, key=keys, executor=e)
        for e in ("auto", "select")
    )
    assert not out.gates.all() and out.gates.any()
    np.testing.assert_array_equal(out.gates, reference.gates)
    np.testing.assert_allclose(out.logits, reference.logits, atol=1e-4)
    full = model.apply(TOKENS, time=TIME).logits
    assert np.abs(out.logits - full).max() > 1e-3


def test_padding_on_the_left_moves_nothing(model):
    padded = np.concatenate([np.full((3, 4), 7), TOKENS], axis=1)
    valid = np.broadcast_to(np.arange(12) >= 4, (3, 12))
    alone = model.apply(TOKENS, time=TIME).logits
    logits = model.apply(padded, valid, time=TIME).logits[:, 4:]
    np.testing.assert_allclose(logits, alone, atol=1e-4)


# -------------------------------------------------------------------------------------- adaLN


def test_the_time_counts_only_for_a_model_that_is_conditioned_on_it(model):
    without, early, late = (model.apply(TOKENS, time=t).logits for t in (None, 0.1, 0.9))
    if not model.config.time_conditioning:
        np.testing.assert_array_equal(early, without)
        np.testing.assert_array_equal(late, without)
        return
    assert np.abs(early - without).max() > 1e-3 and np.abs(early - late).max() > 1e-3
    np.testing.assert_allclose(model.apply(TOKENS, time=0.0).logits, without, atol=1e-4)
    rows = model.apply(TOKENS, time=TIME).logits  # each row has a time of its own
    for i, t in enumerate(TIME):
        alone = model.apply(TOKENS[i : i + 1], time=t).logits[0]
        np.testing.assert_allclose(rows[i], alone, atol=1e-4)


def test_a_constant_is_what_the_time_zero_gives():
    timed = FAMILIES["timed"]
    params = random_params(timed)
    constant = Model(dataclasses.replace(timed, time_conditioning=False), params)
    expected = Model(timed, params).apply(TOKENS, time=0.0).logits
    np.testing.assert_allclose(constant.apply(TOKENS).logits, expected, atol=1e-4)


def test_the_noise_of_the_time_by_hand():
    cfg = FAMILIES["timed"]
    time = random_params(cfg)["time"]
    sigma = -np.log(1 - 0.999 * 0.5)
    angles = sigma * np.exp(-np.log(10000) * np.arange(128) / 128)
    x = np.concatenate([np.cos(angles), np.sin(angles)])
    for name in ("up", "down"):
        x = x @ np.asarray(time[name]) + np.asarray(time[f"{name}_bias"])
        x = x / (1 + np.exp(-x))
    c = transformer.conditioning(cfg, {"time": time}, jnp.array([0.5]))
    np.testing.assert_allclose(c[0], x, rtol=1e-4, atol=1e-5)


def test_blocks_begin_as_the_identity():
    cfg = FAMILIES["mdlm"]
    params, tokens = init_params(cfg), jnp.asarray(TOKENS, jnp.int32)
    h = jax.jit(lambda params: transformer.run_layers(cfg, params, tokens, None).h)(params)
    np.testing.assert_array_equal(h, params["embed"]["table"][TOKENS])


@pytest.mark.parametrize("timed", [False, True])
def test_every_parameter_of_adaln_is_trained(timed):
    cfg = FAMILIES["timed" if timed else "mdlm"]
    tokens = jnp.asarray(TOKENS, jnp.int32)

    @jax.jit
    @jax.grad
    def gradient(params):
        h = transformer.run_layers(cfg, params, tokens, None, time=TIME).h
        return jax.nn.logsumexp(transformer.predict_logits(cfg, params, h, time=TIME)).sum()

    for name, g in trees.named_leaves(gradient(random_params(cfg))):
        assert np.abs(g).max() > 0, name


# --------------------------------------------------------------------------------------- GPT-2


def test_gpt2_decodes_as_whole_passes_would():
    cfg = dataclasses.replace(FAMILIES["gpt2"], mask_id=None, eos_id=None)
    model = Model(cfg, random_params(cfg))
    prompts = np.random.default_rng(1).integers(2, 60, (2, 5))
    valid = np.arange(5) >= np.array([0, 2])[:, None]
    out = generate(model, prompts, valid, sampler=Autoregressive(6))
    for row, start in enumerate((0, 2)):
        text = prompts[row, start:]
        for _ in range(6):
            text = np.append(text, model.apply(text[None]).logits[0, -1].argmax())
        np.testing.assert_array_equal(out.tokens[row, start:], text)


def test_a_whole_causal_pass_needs_no_array_of_who_sees_whom():
    cfg = FAMILIES["gpt2"]
    params, tokens = random_params(cfg), jnp.asarray(TOKENS, jnp.int32)

    @jax.jit
    def first_layer(params):
        params = transformer.prepare_for_inference(cfg, params)
        layer = trees.layer_slice(params["layers"], 0)
        part = transformer.layer_of(cfg, params["form"])
        rows = transformer.block_inputs(cfg, None, tokens.shape)
        h = transformer.embed(cfg, params, tokens, rows)
        q, new = part.project(layer, h, rows)
        return part.block(layer, h, rows), part.mix(layer, h, q, new, rows)

    whole, by_positions = first_layer(params)
    np.testing.assert_allclose(whole, by_positions, atol=1e-5)


def test_the_presets_have_the_sizes_of_the_paper():
    for num_blocks in (4, 6, 8, 10, 12):
        cfg = families.mdlm(num_blocks)
        assert (cfg.num_layers, cfg.d_model, cfg.num_heads, cfg.d_ff) == (num_blocks, 768, 12, 3072)
        assert (cfg.vocab_size, cfg.mask_id, cfg.eos_id, cfg.max_length) == (
            50258, 50257, 50256, 1024,
        )  # fmt: skip
    assert families.llada_small(2, 64, 63, 62, 1, 0).cond_dim == 0
