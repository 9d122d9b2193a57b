"""Products in 8 bits, against NumPy: bit for bit in int8, and to the sum's rounding in e4m3."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dials_jax.nn import eight_bits
from dials_jax.nn.block import Head, pad_vocabulary
from dials_jax.nn.eight_bits import dequantise, dequantise_modules, quantise, quantise_modules
from dials_jax.nn.fusing import fuse, unfuse
from dials_jax.nn.linear import linear
from dials_jax.nn.modules import Form, bind
from tests.conftest import init_params, small_config

LARGEST = {"int8": np.float32(127), "fp8": np.float32(448)}
DTYPES = {"int8": np.int8, "fp8": ml_dtypes.float8_e4m3fn}
KINDS = list(LARGEST)
AXES = {
    "BTD,DF->BTF": (1, (24, 40)),
    "BTD,DNH->BTNH": (1, (24, 5, 8)),
    "BTNH,NHD->BTD": (2, (3, 8, 40)),
}
HEAD = "BTD,DV->BTV"


def draw(*shape, seed=0, dtype=np.float32):
    """Numbers of many magnitudes, some rows of zeros."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * np.exp(rng.normal(size=(*shape[:-1], 1)))
    x.reshape(-1, shape[-1])[::7] = 0
    return x.astype(np.float32).astype(dtype)


def plain_quantise(x, kind, axes):
    """In float32, as IEEE rounds it."""
    x = np.asarray(x, np.float32)
    magnitude = np.maximum(np.abs(x).max(axis=axes, keepdims=True), np.float32(1e-30))
    values = x * (LARGEST[kind] / magnitude)
    values = np.rint(values) if kind == "int8" else values
    return values.astype(DTYPES[kind]), magnitude * (1 / LARGEST[kind])


def plain_linear(x, kernel, kind, axes):
    """Quantise, multiply, sum exactly, dequantise."""
    count = 1 if axes == HEAD else AXES[axes][0]
    last = tuple(range(-count, 0))
    x, x_scale = plain_quantise(x, kind, last)
    w, w_scale = plain_quantise(kernel.astype(ml_dtypes.bfloat16), kind, tuple(range(count)))
    exact = np.int64 if kind == "int8" else np.float64
    sums = np.einsum(axes, x.astype(exact), w.astype(exact)).astype(np.float32)
    x_scale = x_scale.reshape(*x_scale.shape[:2], *[1] * (sums.ndim - 2))
    return (sums * x_scale) * w_scale.reshape(w_scale.shape[count:])


def weight_of(kernel, kind, axes):
    """As a model's weight is quantised."""
    module, name = {
        "BTD,DF->BTF": ("mlp", "up"), "BTD,DNH->BTNH": ("attention", "q"),
        "BTNH,NHD->BTD": ("attention", "o"), HEAD: ("head", "kernel"),
    }[axes]  # fmt: skip
    return quantise_modules({module: {name: jnp.asarray(kernel)}}, kind)[module][name]


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_numpy(kind, axes):
    count, shape = AXES[axes]
    x, kernel = draw(2, 9, *shape[:count]), draw(*shape, seed=1)
    weight = weight_of(kernel, kind, axes)
    actual = np.asarray(jax.jit(partial(linear, axes=axes))(x, weight))
    expected = plain_linear(x, kernel, kind, axes)
    if kind == "int8":
        np.testing.assert_array_equal(actual, expected)
    else:  # the order of the sum
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
    exact = np.einsum(axes, x, kernel)
    error = np.abs(actual - exact).max() / np.abs(exact).max()
    assert 0 < error < {"int8": 0.05, "fp8": 0.1}[kind]


@pytest.mark.parametrize("vocab_size, padded", [(128, False), (131, False), (131, True)])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_the_head_are_those_of_numpy(kind, vocab_size, padded):
    """In float32, from a stream in bfloat16: nothing is rounded behind the product."""
    cfg = small_config(d_model=24, vocab_size=vocab_size, head_bias=True, dtype="bfloat16")
    h, kernel = draw(2, 9, 24, dtype=ml_dtypes.bfloat16), draw(24, vocab_size, seed=1)
    bias = draw(vocab_size, seed=2)
    head = {"kernel": weight_of(kernel, kind, HEAD), "bias": jnp.asarray(bias)}
    assert head["kernel"].scales.shape == (vocab_size,)  # one for every token of the vocabulary
    if padded:
        head["padded"] = pad_vocabulary(head["kernel"])
    module = bind(Head, head, cfg, form=Form(padded_head=padded))
    actual, expected = jax.jit(module)(h), plain_linear(h, kernel, kind, HEAD) + bias
    assert actual.dtype == np.float32 and actual.shape == (2, 9, vocab_size)
    if kind == "int8":
        np.testing.assert_array_equal(actual, expected)
    else:
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_is_that_of_numpy(kind):
    x = draw(5, 6, 7, dtype=ml_dtypes.bfloat16)
    for count in (1, 2):
        values, scales = plain_quantise(x, kind, tuple(range(-count, 0)))
        found = jax.jit(quantise, static_argnums=(1, 2))(jnp.asarray(x), kind, count)
        assert found.values.dtype == DTYPES[kind] and found.name == kind
        np.testing.assert_array_equal(np.asarray(found.values).view(np.int8), values.view(np.int8))
        np.testing.assert_array_equal(found.scales, scales.reshape(scales.shape[: 3 - count]))
        restored = values.astype(np.float32) * scales
        np.testing.assert_array_equal(dequantise(found), restored)
        assert np.isfinite(restored).all()
        assert np.abs(values.astype(np.float32)).max() == LARGEST[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_is_multiplied_alike_in_every_batch(kind):
    weight = weight_of(draw(24, 40, seed=1), kind, "BTD,DF->BTF")
    x = draw(4, 9, 24)
    times = jax.jit(linear)
    whole = np.asarray(times(x, weight))
    x[1:], x[0, 5:] = 1e3, -7.0  # other sequences, and other tokens of its own
    np.testing.assert_array_equal(times(x, weight)[0, :5], whole[0, :5])
    assert not np.array_equal(times(x, weight)[0, 5:], whole[0, 5:])


def test_no_other_weights_are_quantised_and_both_layouts_are():
    cfg = small_config(qkv_bias=True)
    layers = init_params(cfg)["layers"]
    one = quantise_modules(jax.tree.map(lambda x: x[1], layers), "int8")
    assert {k for part in one.values() for k, x in part.items() if eight_bits.is_quantised(x)} == {
        *"qkvo", "gate", "up", "down"
    }  # fmt: skip
    stacked = jax.vmap(lambda layer: quantise_modules(layer, "int8"))(layers)
    for a, b in zip(jax.tree.leaves(stacked), jax.tree.leaves(one), strict=True):
        np.testing.assert_array_equal(a[1], b)
    back = dequantise_modules(one, np.float32)
    for a, b in zip(jax.tree.leaves(layers), jax.tree.leaves(back), strict=True):
        np.testing.assert_allclose(a[1], b, atol=0.01 * np.abs(a[1]).max())
    for parts in (1, 2):
        joined = jax.jit(fuse, static_argnums=1)(one, parts)
        assert eight_bits.is_quantised(joined["attention"]["qkv"])
        apart = unfuse(joined, cfg, parts)
        for a, b in zip(jax.tree.leaves(apart), jax.tree.leaves(one), strict=True):
            np.testing.assert_array_equal(a, b)


def test_gradients_are_refused_rather_than_zero():
    weight = weight_of(draw(24, 40), "fp8", "BTD,DF->BTF")
    with pytest.raises(NotImplementedError, match="weights in 8 bits have no gradient"):
        jax.grad(lambda x: linear(x, weight).sum())(jnp.ones((1, 2, 24)))
