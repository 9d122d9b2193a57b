"""The TPU kernel is the same attention, and is taken only for what it can do."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dials_jax import sharding
from dials_jax.nn.attention import attend
from dials_jax.nn.kernels import per_device, tpu_attention
from dials_jax.nn.kernels.dispatch import ATTENTION
from dials_jax.nn.kv import KV
from dials_jax.nn.mask import Mask


def make(num_queries, num_keys, dtype="float32", num_rows=2, num_heads=4, num_kv_heads=2):
    keys = jax.random.split(jax.random.key(0), 3)
    rows = {"q": (num_queries, num_heads), "k": (num_keys, num_kv_heads)}
    q, k, v = (
        jax.random.normal(key, (num_rows, *rows[name], 16), dtype)
        for key, name in zip(keys, "qkk", strict=True)
    )
    return q, KV(k, v)


def value_and_gradients(fn, q, kv, counted):
    weights = jax.random.normal(jax.random.key(1), q.shape) * counted
    loss = jax.value_and_grad(lambda q, kv: jnp.sum(fn(q, kv) * weights), argnums=(0, 1))
    with jax.default_matmul_precision("highest"):
        return jax.jit(loss)(q, kv)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("num_queries", "num_keys", "causal"),
    [(384, 384, False), (384, 384, True), (128, 256, False)],  # several blocks, and unequal ones
)
def test_it_equals_attend(num_queries, num_keys, causal, padded):
    q, kv = make(num_queries, num_keys)
    valid = jnp.arange(num_keys) >= jnp.array([[0], [100]]) if padded else None
    # A query that sees no key has no right answer: padding on the left, in a causal model.
    counted = valid[:, :, None, None] if padded and causal else 1
    mask = Mask(valid, causal)
    expected = value_and_gradients(partial(attend, mask=mask), q, kv, counted)
    kernel = partial(tpu_attention.splash_attention, valid=valid, causal=causal, interpret=True)
    actual = value_and_gradients(kernel, q, kv, counted)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_it_is_taken_for_long_sequences_in_half_precision_on_tpu(monkeypatch):
    splash = ATTENTION[0]

    def fits(*sizes):
        return splash.refusal(*make(*sizes), Mask()) is None

    assert splash.name == "tpu_splash" and not fits(1024, 1024, "bfloat16")
    monkeypatch.setattr(per_device, "on_tpu", lambda: True)
    with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
        assert fits(1024, 1024, "bfloat16")
        assert fits(128, 1024, "bfloat16")
        assert not fits(1024, 1024, "float32")
        assert not fits(512, 512, "bfloat16")
        assert not fits(1000, 1024, "bfloat16")
        assert not fits(1024, 1100, "bfloat16")


def test_attend_takes_it(monkeypatch):
    calls = []

    kernel = tpu_attention.splash_attention

    def interpreted(*args):
        calls.append(args)
        return kernel(*args, interpret=True)

    monkeypatch.setattr(per_device, "on_tpu", lambda: True)
    monkeypatch.setattr(tpu_attention, "splash_attention", interpreted)
    q, kv = make(128, 1024, "bfloat16", num_rows=1)
    valid = jnp.arange(1024)[None] >= 10
    actual = attend(q, kv, Mask(valid))
    in_float32 = jax.tree.map(lambda x: x.astype("float32"), (q, kv))
    expected = attend(*in_float32, Mask(valid))
    assert len(calls) == 1 and actual.dtype == jnp.bfloat16
    np.testing.assert_allclose(actual.astype("float32"), expected, atol=2e-2)
    attend(q, kv, Mask(valid, causal=True).at(jnp.arange(128)[None]))  # it knows no positions
    assert len(calls) == 1
