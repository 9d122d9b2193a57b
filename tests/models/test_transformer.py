import dataclasses
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dials_jax import sharding
from dials_jax.config import ModelConfig
from dials_jax.errors import InputError
from dials_jax.models import families, transformer
from dials_jax.models.model import Model, sequence_keys
from dials_jax.nn.policy import Denoising
from tests.conftest import init_params, small_config

BASE = small_config()
TOKENS = np.random.default_rng(0).integers(2, 60, (2, 8))

# One other value a field, and the fields that change no output of a forward pass, with the reason.
OTHER = {
    "vocab_size": 65, "d_model": 48, "num_layers": 3, "num_heads": 8, "num_kv_heads": 2,
    "head_dim": 10, "d_ff": 96, "rope_theta": 100.0, "norm_eps": 1e-2, "qkv_bias": True,
    "o_bias": True, "mlp_bias": True, "head_bias": True, "norm": "layer", "mlp": "gelu",
    "norm_bias": True, "cond_dim": 8, "time_conditioning": True,
    "causal": True, "right_shift": True, "dtype": "bfloat16", "qk_norm": True, "block_length": 2,
}  # fmt: skip
# What else must hold, before and after, for a field to be there at all.
WITH = {
    "norm_bias": {"norm": "layer"},
    "cond_dim": {"norm": "layer"},
    "time_conditioning": {"norm": "layer", "cond_dim": 8},
}
WITHOUT_EFFECT = {
    "model_type": "names the family in config.json",
    "max_length": "bounds what generate and likelihood accept",
    "mask_id": "tells policies which tokens vote, samplers which to fill",
    "eos_id": "used by samplers and scoring",
    "pad_id": "fills positions that `valid` hides",
    "subs": "used by samplers and scoring",
    "eot_id": "used by samplers and scoring",
}


def logits_of(cfg):
    """Logits, and the stream's dtype, of random parameters, biases and norms included."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: transformer.init(cfg, jax.random.key(0)))
    params = jax.tree.map(lambda x: 0.3 * rng.normal(size=x.shape).astype(np.float32), shapes)

    @jax.jit
    def forward(params, tokens):
        time = jnp.full(2, 0.5)
        h = transformer.run_layers(cfg, params, tokens, None, time=time).h
        return h, transformer.predict_logits(cfg, params, h, time=time)

    h, logits = forward(params, TOKENS)
    return np.asarray(logits), h.dtype


def test_every_field_is_tested_or_excused():
    fields = {f.name for f in dataclasses.fields(ModelConfig)}
    assert fields == OTHER.keys() | WITHOUT_EFFECT.keys()


@pytest.fixture(scope="module")
def base():
    return lru_cache(logits_of)


@pytest.mark.parametrize("field", [*OTHER, "positions"])
def test_every_field_changes_the_output(field, base):
    cfg = dataclasses.replace(BASE, **WITH.get(field, {}))
    change = {"rope_theta": None} if field == "positions" else {field: OTHER[field]}
    (before, dtype), (other, other_dtype) = base(cfg), base(dataclasses.replace(cfg, **change))
    assert other.dtype == np.float32
    assert (
        other.shape != before.shape or other_dtype != dtype or np.abs(other - before).max() > 1e-4
    )


@pytest.mark.parametrize(
    ("preset", "parameters", "q_shape"),
    [
        (families.llada_8b, 8_015_581_184, (32, 4096, 32, 128)),
        (families.dream_7b, 7_615_616_512, (28, 3584, 28, 128)),
        (families.qwen2_5_7b, 7_615_616_512, (28, 3584, 28, 128)),
        (families.mdlm, 169_627_218, (12, 768, 12, 64)),
        # The published numbers, and a head apart from the embedding.
        (families.gpt2, 124_439_808 + 50257 * 768, (12, 768, 12, 64)),
        (families.gpt2_large, 774_030_080 + 50257 * 1280, (36, 1280, 20, 64)),
    ],
)
def test_shapes_and_parameters_of_the_published_models(preset, parameters, q_shape):
    cfg = preset()
    params = jax.eval_shape(lambda: transformer.init(cfg, jax.random.key(0)))
    assert sum(int(np.prod(x.shape)) for x in jax.tree.leaves(params)) == parameters
    assert params["layers"]["attention"]["q"].shape == q_shape


def test_a_left_padded_row_equals_the_row_alone(model, cfg):
    padded = np.concatenate([np.full((2, 5), cfg.pad_id), TOKENS], axis=1)
    valid = np.broadcast_to(np.arange(13) >= 5, (2, 13))
    alone = model.apply(TOKENS).logits
    np.testing.assert_allclose(model.apply(padded, valid).logits[:, 5:], alone, atol=1e-5)
    unlike = np.where(valid, padded, 7)  # whatever the padding holds
    np.testing.assert_array_equal(
        model.apply(unlike, valid).logits[:, 5:], model.apply(padded, valid).logits[:, 5:]
    )
    assert not np.allclose(model.apply(padded).logits[:, 5:], alone, atol=1e-3)


def test_rows_of_different_length_share_a_batch(model, cfg):
    valid = np.arange(8) >= np.array([0, 3])[:, None]
    out = model.apply(TOKENS, valid).logits
    np.testing.assert_allclose(out[0], model.apply(TOKENS).logits[0], atol=1e-5)
    short = model.apply(np.repeat(TOKENS[1:, 3:], 2, axis=0)).logits
    np.testing.assert_allclose(out[1, 3:], short[1], atol=1e-5)


def test_every_position_sees_every_other(model):
    changed = TOKENS.copy()
    changed[:, -1] = 5
    before, after = model.apply(TOKENS).logits, model.apply(changed).logits
    assert (np.abs(before - after).max(axis=-1) > 0).all()  # the first token sees the last


def test_a_causal_model_sees_no_token_to_the_right(model, cfg):
    causal = Model(dataclasses.replace(cfg, causal=True), model.params)
    changed = TOKENS.copy()
    changed[:, 5] = (changed[:, 5] + 1) % 60
    before, after = causal.apply(TOKENS).logits, causal.apply(changed).logits
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert (np.abs(before - after).max(axis=-1) > 0)[:, 5:].all()
    padded = np.concatenate([np.full((2, 3), cfg.pad_id), TOKENS], axis=1)
    valid = np.broadcast_to(np.arange(11) >= 3, (2, 11))
    np.testing.assert_allclose(causal.apply(padded, valid).logits[:, 3:], before, atol=1e-5)


# --------------------------------------------------------------------------------------- shift


def test_a_shifted_model_predicts_every_token_from_the_row_to_its_left(model, cfg):
    raw = model.apply(TOKENS).logits
    logits = Model(dataclasses.replace(cfg, right_shift=True), model.params).apply(TOKENS).logits
    np.testing.assert_allclose(logits[:, 1:], raw[:, :-1], atol=1e-6)
    np.testing.assert_allclose(logits[:, 0], raw[:, 0], atol=1e-6)


def test_a_left_padded_row_of_a_shifted_model_equals_the_row_alone(model, cfg):
    shifted = Model(dataclasses.replace(cfg, right_shift=True), model.params)
    valid = np.arange(8) >= np.array([0, 3])[:, None]
    out = shifted.apply(TOKENS, valid).logits
    np.testing.assert_allclose(out[0], shifted.apply(TOKENS[:1]).logits[0], atol=1e-5)
    np.testing.assert_allclose(out[1, 3:], shifted.apply(TOKENS[1:, 3:]).logits[0], atol=1e-5)


# ------------------------------------------------------------------------------- configurations


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"norm": "batch"}, "norm='batch' is not known; valid names: layer, rms"),
        ({"mlp": "relu"}, "mlp='relu' is not known; did you mean 'gelu'"),
        ({"cond_dim": 8}, "set norm='layer'"),
        ({"norm_bias": True}, "set norm='layer'"),
        ({"time_conditioning": True}, "set cond_dim"),
        ({"cond_dim": -1}, "cond_dim=-1"),
    ],
)
def test_settings_that_do_not_fit_are_named(changes, words, untyped):
    with pytest.raises(InputError, match=words):
        small_config(**changes)


@pytest.mark.parametrize("name", ["mask_id", "eos_id"])
def test_only_a_causal_model_does_without_special_tokens(name):
    with pytest.raises(InputError, match=f"{name} is missing"):
        dataclasses.replace(BASE, **{name: None})
    assert getattr(dataclasses.replace(BASE, causal=True, **{name: None}), name) is None


def test_a_causal_model_is_not_shifted():
    with pytest.raises(InputError, match="right_shift"):
        small_config(causal=True, right_shift=True)


def test_policies_see_masked_tokens_without_padding(model, cfg):
    seen = []

    class Spy:
        def prepare(self, num_layers, denoising):
            seen.append(denoising)
            return np.ones(num_layers, bool)

        def gate(self, plan, h, denoising):
            return plan

    tokens = jnp.array([[cfg.mask_id, 3, cfg.mask_id]])
    valid = jnp.array([[False, True, True]])
    transformer.run_layers(cfg, model.params, tokens, valid, Spy(), step=7)
    assert isinstance(seen[0], Denoising) and seen[0].step == 7
    np.testing.assert_array_equal(seen[0].masked, [[False, False, True]])


def test_recomputing_blocks_changes_no_gradient(model, cfg):
    def loss(layers, remat):
        params = {**model.params, "layers": layers}
        return transformer.run_layers(cfg, params, jnp.asarray(TOKENS), None, remat=remat).h.sum()

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    plain, remat = (gradient(model.params["layers"], r) for r in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), plain, remat)


# ------------------------------------------------------------------------------------- row keys


def test_one_key_is_folded_with_the_row():
    keys = sequence_keys(jax.random.key(3), 4)
    data = np.asarray(jax.random.key_data(keys))
    assert len(np.unique(data, axis=0)) == 4
    np.testing.assert_array_equal(jax.random.key_data(sequence_keys(keys, 4)), data)
    np.testing.assert_array_equal(
        jax.random.key_data(sequence_keys(None, 2)),
        jax.random.key_data(sequence_keys(jax.random.key(0), 2)),
    )


def test_a_wrong_number_of_keys_is_refused():
    with pytest.raises(InputError, match="3 keys for 4 sequences"):
        sequence_keys(jax.random.split(jax.random.key(0), 3), 4)


def test_keys_of_the_old_kind_are_refused():
    with pytest.raises(InputError, match=r"jax\.random\.key"):
        sequence_keys(jax.random.PRNGKey(0), 2)


def test_rows_fill_up_to_a_multiple(cfg):
    model = Model(cfg, init_params(cfg))
    rows = model.place_sequences((np.arange(5), np.eye(5)), 4)
    np.testing.assert_array_equal(rows[0], [0, 1, 2, 3, 4, 4, 4, 4])
    assert rows[1].shape == (8, 5)


def test_on_a_mesh_a_batch_is_no_larger_than_its_shards_need(cfg, monkeypatch):
    """As `pods` and the estimates count it: not the least common multiple, 56 rows for 7."""
    model = Model(cfg, init_params(cfg))
    monkeypatch.setattr(sharding, "num_batch_shards", lambda mesh: 8)
    for count, multiple, placed in ((5, 1, 8), (7, 7, 8), (3, 12, 16), (20, 12, 32)):
        assert model.place_sequences(np.arange(count), multiple).shape == (placed,)


@pytest.mark.parametrize(
    ("tokens", "valid", "words"),
    [
        ([[3, 4], [5]], None, "sequences differ in length; pad them on the left"),
        ([3, 4], None, r"tokens have shape \(2,\); give"),
        (jnp.array([3, 4]), None, r"tokens have shape \(2,\); give"),
        ([[3, 64]], None, "sequence 0 has token 64, outside the vocabulary of 64"),
        ([[3, 4], [5, -1]], None, "sequence 1 has token -1, outside"),
        ([[3.5, 4.0]], None, "sequences are of float64; give token ids"),
        ([[3, 4], [5, 6]], [[1, 1]], r"valid has shape \(1, 2\) and tokens \(2, 2\)"),
    ],
)
def test_rows_that_are_none_are_refused(model, tokens, valid, words, untyped):
    with pytest.raises(InputError, match=words):
        model.apply(tokens, valid)


def test_more_tokens_than_learned_positions_are_refused():
    cfg = families.gpt2_small(1, 32, 64, 1, 0, max_length=4, dtype="float32")
    model = Model(cfg, init_params(cfg))
    with pytest.raises(InputError, match="5 tokens are more than the model's 4 positions"):
        model.apply(jnp.full((1, 5), 3))
    model.apply(jnp.full((1, 4), 3))


def test_padding_in_a_pass_may_hold_anything(model, untyped):
    expected = model.apply([[0, 3]], [[False, True]]).logits[:, 1]
    found = model.apply([[999, 3]], [[False, True]]).logits[:, 1]
    np.testing.assert_array_equal(found, expected)
