"""Norm, rotary embedding and attention against formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dials_jax.nn.attention import Attention, attend
from dials_jax.nn.kv import KV
from dials_jax.nn.mask import Mask
from dials_jax.nn.mlp import MLP
from dials_jax.nn.norm import RMSNorm
from dials_jax.nn.rope import apply_rope, positions_of, rope_angles
from tests.conftest import small_config

RNGS = nnx.Rngs(0)


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


# ------------------------------------------------------------------------------------------ norm


def test_rms_norm_by_hand():
    norm = RMSNorm(2, 1.0, RNGS)
    norm.scale[...] = jnp.array([1.0, 2.0])
    # mean square (9 + 5) / 2 = 7, plus eps 1, root sqrt(8)
    expected = [3 / 8**0.5, 2 * 5**0.5 / 8**0.5]
    np.testing.assert_allclose(norm(jnp.array([3.0, 5**0.5])), expected, rtol=1e-6)


def test_rms_norm_rounds_before_it_scales():
    norm = RMSNorm(64, 1e-5, RNGS)
    norm.scale[...] = 1 + 0.1 * normal(64)
    x = normal(8, 64, seed=1).astype(jnp.bfloat16)
    x32, scale = np.asarray(x, np.float32), np.asarray(norm.scale[...])
    normed = x32 / np.sqrt((x32**2).mean(-1, keepdims=True) + 1e-5)
    before = jnp.asarray(normed).astype(jnp.bfloat16) * jnp.asarray(scale).astype(jnp.bfloat16)
    after = jnp.asarray(normed * scale).astype(jnp.bfloat16)
    np.testing.assert_array_equal(norm(x), before)
    assert (np.asarray(before) != np.asarray(after)).any()


# ------------------------------------------------------------------------------------------ rope


def test_rope_by_hand():
    # One head of 4: pairs (0, 2) and (1, 3) with frequencies 1 and 100^(-2/4) = 0.1.
    sin_cos = rope_angles(jnp.array([[3]]), 4, 100.0)
    x = jnp.array([1.0, 2.0, 3.0, 4.0])
    a, b = 3.0, 0.3
    expected = [
        1 * np.cos(a) - 3 * np.sin(a),
        2 * np.cos(b) - 4 * np.sin(b),
        3 * np.cos(a) + 1 * np.sin(a),
        4 * np.cos(b) + 2 * np.sin(b),
    ]
    np.testing.assert_allclose(
        apply_rope(x[None, None, None], sin_cos)[0, 0, 0], expected, rtol=1e-5
    )


def test_rope_is_relative():
    q, k = normal(1, 6, 2, 8), normal(1, 6, 2, 8, seed=1)
    positions = jnp.arange(6)[None]

    def scores(shift):
        sin_cos = rope_angles(positions + shift, 8, 1e4)
        return jnp.einsum("BTNH,BSNH->BNTS", apply_rope(q, sin_cos), apply_rope(k, sin_cos))

    np.testing.assert_allclose(scores(100), scores(0), atol=1e-4)
    plain = jnp.einsum("BTNH,BSNH->BNTS", q, k)
    assert np.abs(scores(0) - plain).max() > 0.1


def test_positions_count_from_the_first_real_token():
    valid = jnp.array([[True] * 4, [False, False, True, True]])
    np.testing.assert_array_equal(positions_of(valid), [[0, 1, 2, 3], [0, 0, 0, 1]])


def test_angles_are_float32_at_far_positions():
    sin, cos = rope_angles(jnp.array([[4095]]), 128, 5e5)[0, 0]
    angles = 4095 * 5e5 ** (-np.arange(0, 128, 2) / 128)
    np.testing.assert_allclose(sin, np.sin(angles), atol=1e-3)
    np.testing.assert_allclose(cos, np.cos(angles), atol=1e-3)


# ------------------------------------------------------------------------------------- attention


def test_attention_by_hand():
    q, k, v = normal(1, 3, 2, 4), normal(1, 3, 2, 4, seed=1), normal(1, 3, 2, 4, seed=2)
    scores = np.einsum("BTNH,BSNH->BNTS", q, k) / 4**0.5
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    expected = np.einsum("BNTS,BSNH->BTNH", weights, v)  # no causal order
    np.testing.assert_allclose(attend(q, KV(k, v)), expected, atol=1e-5)


def test_attention_ignores_padded_keys():
    q, k, v = normal(2, 5, 2, 4), normal(2, 5, 2, 4, seed=1), normal(2, 5, 2, 4, seed=2)
    valid = jnp.array([[False, False, True, True, True], [True] * 5])
    out = attend(q, KV(k, v), Mask(valid))
    noise = jnp.where(valid[..., None, None], 0, 100 * normal(2, 5, 2, 4, seed=3))
    noisy = KV(k + noise, v + noise)
    np.testing.assert_array_equal(attend(q, noisy, Mask(valid)), out)
    alone = attend(q[:1], KV(k[:1, 2:], v[:1, 2:]))
    np.testing.assert_allclose(out[0], alone[0], atol=1e-5)
    assert not np.allclose(attend(q, noisy)[0], out[0])


def test_a_causal_query_sees_its_own_place_and_those_to_its_left():
    q, k, v = normal(1, 2, 2, 4), normal(1, 5, 2, 4, seed=1), normal(1, 5, 2, 4, seed=2)
    out = attend(q, KV(k, v), Mask(causal=True).at(jnp.array([[3, 1]])))
    for i, place in enumerate((3, 1)):
        seen = KV(k[:, : place + 1], v[:, : place + 1])
        np.testing.assert_allclose(out[:, i], attend(q[:, i : i + 1], seen)[:, 0], atol=1e-5)


def test_grouped_heads_equal_repeated_heads():
    q, k, v = normal(2, 5, 4, 8), normal(2, 5, 2, 8, seed=1), normal(2, 5, 2, 8, seed=2)
    repeated = attend(q, KV(jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2)))
    np.testing.assert_allclose(attend(q, KV(k, v)), repeated, atol=1e-5)


@pytest.mark.parametrize("name", ["q_bias", "k_bias", "v_bias", "o_bias"])
def test_attention_uses_its_biases(name):
    attention = Attention(small_config(o_bias=True, qkv_bias=True), nnx.Rngs(0))
    x, sin_cos = normal(1, 4, 32), rope_angles(jnp.arange(4)[None], 8, 1e4)

    def run():
        q, kv = attention.rotated(x, sin_cos)
        return attention.out(attend(q, kv))

    before = run()
    bias = getattr(attention, name)
    bias[...] = normal(*bias.shape, seed=1)
    assert not np.allclose(run(), before, atol=1e-4)


@pytest.mark.parametrize("name", ["gate_bias", "up_bias", "down_bias"])
def test_swiglu_uses_its_biases(name):
    mlp = MLP(small_config(mlp_bias=True), nnx.Rngs(0))
    x = normal(1, 4, 32)
    before = mlp(x)
    bias = getattr(mlp, name)
    bias[...] = normal(*bias.shape, seed=1)
    assert not np.allclose(mlp(x), before, atol=1e-4)


def test_swiglu_by_hand():
    mlp = MLP(small_config(), nnx.Rngs(0))
    x = np.asarray(normal(1, 3, 32))
    gate, up = x @ np.asarray(mlp.gate[...]), x @ np.asarray(mlp.up[...])
    expected = (gate / (1 + np.exp(-gate)) * up) @ np.asarray(mlp.down[...])
    np.testing.assert_allclose(mlp(jnp.asarray(x)), expected, atol=1e-6)
