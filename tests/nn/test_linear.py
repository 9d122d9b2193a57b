"""Gradients of shared parameters are sums in float32; values are those of the plain operation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dials_jax.nn.block import gated
from dials_jax.nn.gates import apply_gate
from dials_jax.nn.linear import scaled, shifted
from dials_jax.nn.mlp import linear
from dials_jax.nn.norm import RMSNorm

B, T, D = 4, 512, 16


def normal(seed, *shape, dtype="bfloat16"):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def normed(scale, x):
    norm = RMSNorm(D, 1e-5, nnx.Rngs(0))
    norm.scale.set_value(scale)
    return norm(x)


def biased(bias, x):
    return linear(x, nnx.Param(jnp.eye(D)), nnx.Param(bias))


def chosen(gate, x):
    return apply_gate(gate, x, 2 * x)


SHARED = {
    "RMSNorm's scale": (normed, jnp.linspace(0.5, 2, D)),
    "a bias": (biased, jnp.linspace(-1, 1, D)),
    "adaLN's gate": (lambda gate, x: gated(x, gate), jnp.ones((B, 1, D))),
    "a router's gate": (chosen, jnp.array([0.0, 1.0, 1.0, 0.0])),
}


@pytest.mark.parametrize("name", SHARED)
def test_gradients_in_bfloat16_are_those_of_float32(name):
    """Of the same rounded inputs. What is left is the rounding of each term's factors."""
    fn, shared = SHARED[name]
    x, weights = normal(0, B, T, D), normal(1, B, T, D)

    def total(shared, x, weights):
        return jnp.sum((fn(shared, x) * weights).astype(jnp.float32))

    found = jax.jit(jax.grad(total))(shared, x, weights)
    exact = jax.jit(jax.grad(total))(shared, *(a.astype(jnp.float32) for a in (x, weights)))
    assert found.dtype == jnp.float32
    error = jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact)
    assert error < 1e-3, error


@pytest.mark.parametrize("shape", [(D,), (1, D), (B, 1, D), (B, 1, 1), (B, T, D), (1,)])
def test_values_and_gradients_of_every_way_to_broadcast(shape):
    x, shared = normal(0, B, T, D, dtype="float32"), normal(1, *shape, dtype="float32")
    for ours, plain in ((scaled, jnp.multiply), (shifted, jnp.add)):
        np.testing.assert_array_equal(ours(x, shared), plain(x, shared))
        found, expected = (
            jax.grad(lambda *args, fn=fn: jnp.sum(jnp.sin(fn(*args))), (0, 1))(x, shared)
            for fn in (ours, plain)
        )
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


def test_values_in_bfloat16_are_those_of_bfloat16():
    x, shared = normal(0, B, T, D), normal(1, D, dtype="float32")
    np.testing.assert_array_equal(scaled(x, shared), x * shared.astype(x.dtype))
    np.testing.assert_array_equal(shifted(x, shared), x + shared.astype(x.dtype))
