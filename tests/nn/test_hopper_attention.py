"""The kernel for Hopper is the same attention, and is taken only for what it can do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dials_jax.nn.kernels.hopper_attention import window_attention, window_fits
from dials_jax.nn.kv import KV


def has_interpreter():
    try:
        from jax.experimental.pallas import mosaic_gpu
    except ImportError:
        return False
    return hasattr(mosaic_gpu, "InterpretGPUParams")


interpreted = pytest.mark.skipif(
    not has_interpreter(), reason="this jax has no interpreter of kernels for Hopper"
)


def make(num_queries, num_keys, num_heads=1, num_kv_heads=1, head_dim=128, dtype="bfloat16"):
    rng = np.random.default_rng(0)

    def normal(num_tokens, num_heads, scale=1):
        x = scale * rng.standard_normal((2, num_tokens, num_heads, head_dim))
        return jnp.asarray(x, dtype)

    q = normal(num_queries, num_heads, scale=2)  # so that the weights differ much
    return q, KV(normal(num_keys, num_kv_heads), normal(num_keys, num_kv_heads))


def padding(num_keys):
    """Whole tiles on one side of the first row, and some keys within the second."""
    places = jnp.arange(num_keys)
    return jnp.stack([places >= num_keys - 50, places % 3 != 1])


def expected(q, kv, valid):
    q, k, v = (x.astype("float32") for x in (q, *kv))
    mask = None if valid is None else valid[:, None, None, :]
    return jax.nn.dot_product_attention(q, k, v, mask=mask)


def assert_equals_float32(q, kv, valid):
    actual = window_attention(q, kv, valid, interpret=True)
    assert actual.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        actual.astype("float32"), expected(q, kv, valid), rtol=1e-2, atol=1e-2
    )


@interpreted
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("num_queries", "num_keys"),
    [(16, 192), (64, 72), (64, 200)],  # whole tiles of keys, and not; more tiles than slots
)
def test_it_equals_attention_in_float32(num_queries, num_keys, padded):
    assert_equals_float32(*make(num_queries, num_keys), padding(num_keys) if padded else None)


@interpreted
@pytest.mark.parametrize(
    ("num_queries", "num_heads", "num_kv_heads"),
    [
        (16, 28, 4),
        (8, 4, 2),
        (16, 2, 2),
    ],  # the last tile of a group overlaps; is not full; no group
)
def test_heads_that_share_keys_may_share_a_tile(num_queries, num_heads, num_kv_heads):
    assert_equals_float32(*make(num_queries, 72, num_heads, num_kv_heads), padding(72))


@interpreted
def test_a_row_without_valid_keys_is_finite():
    q, kv = make(16, 64)
    valid = jnp.stack([jnp.zeros(64, bool), jnp.ones(64, bool)])
    actual = window_attention(q, kv, valid, interpret=True).astype("float32")
    assert np.isfinite(actual).all()
    np.testing.assert_allclose(actual[1], expected(q, kv, valid)[1], rtol=1e-2, atol=1e-2)


def test_what_fits():
    assert window_fits(*make(16, 768, 4, 4))
    assert window_fits(*make(64, 72, 4, 2))
    assert window_fits(*make(8, 64))


@pytest.mark.parametrize(
    "shapes",
    [
        {"num_queries": 72},
        {"num_queries": 12},
        {"num_keys": 100},
        {"num_keys": 56},
        {"num_queries": 64, "num_keys": 64},
        {"num_heads": 3, "num_kv_heads": 2},
        {"head_dim": 64},
        {"dtype": "float32"},
        {"dtype": "float16"},
    ],
    ids=str,
)
def test_what_does_not_fit(shapes):
    assert not window_fits(*make(**({"num_queries": 16, "num_keys": 128} | shapes)))


def test_mixed_types_do_not_fit():
    q, kv = make(16, 128)
    assert not window_fits(q, KV(kv.k, kv.v.astype("float32")))
