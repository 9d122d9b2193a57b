"""The GPU kernels are formulas in float32, rounded once. They run in an interpreter on the CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dials_jax.nn.eight_bits import quantise, xla_matmul
from dials_jax.nn.kernels import hopper_matmul as module
from dials_jax.nn.kernels import hopper_tiles
from dials_jax.nn.kernels.hopper_matmul import (
    matmul_e4m3,
    plain,
    swiglu,
    swiglu_fits,
    swiglu_pays,
)
from dials_jax.nn.kernels.hopper_quantise import quantise_rows


def make(leading, depth, num_columns):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(*leading, depth))
    gate_up = rng.normal(size=(depth, 2 * num_columns)) * depth**-0.5
    return jnp.asarray(x, "bfloat16"), jnp.asarray(gate_up, "bfloat16")


def assert_rounded_once(actual, x, gate_up):
    assert actual.dtype == jnp.bfloat16
    expected = plain(x.astype("float32"), gate_up.astype("float32"))
    np.testing.assert_allclose(actual.astype("float32"), expected, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize(
    ("num_rows", "depth", "num_columns", "num_sms"),
    [
        (128, 64, 256, 132),  # more SMs than tiles; one step, so fewer than stages
        (384, 320, 256, 4),  # six tiles on four SMs: one or two each; five steps in four slots
        (128, 384, 384, 1),  # three tiles in turn; six steps
    ],
)
def test_it_is_the_formula(num_rows, depth, num_columns, num_sms, interpreted, monkeypatch):
    monkeypatch.setattr(hopper_tiles, "num_sms", lambda: num_sms)
    monkeypatch.setattr(
        hopper_tiles, "SNAKE", 2
    )  # of three tiles down, one is left for the second turn
    x, gate_up = make((num_rows,), depth, num_columns)
    assert_rounded_once(swiglu(x, gate_up), x, gate_up)


def test_the_tolerance_tells_one_rounding_from_many():
    x, gate_up = make((128,), 64, 128)
    with pytest.raises(AssertionError, match="Mismatched elements"):
        assert_rounded_once(plain(x, gate_up), x, gate_up)


def test_leading_dimensions_and_gradients(interpreted):
    x, gate_up = make((2, 2, 32), 64, 128)
    weights, _ = make((2, 2, 32), 128, 128)
    actual, pull = jax.vjp(jax.jit(swiglu), x, gate_up)
    assert actual.shape == weights.shape
    assert_rounded_once(actual, x, gate_up)
    expected = jax.jit(lambda *args: jax.vjp(plain, *args[:2])[1](args[2]))(x, gate_up, weights)
    for a, b in zip(pull(weights), expected, strict=True):
        assert a.dtype == b.dtype == jnp.bfloat16
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("num_rows", "depth", "num_columns", "num_sms", "tile", "halves"),
    [
        (128, 128, 128, 132, 64, 1),  # one step
        (128, 128, 128, 132, 64, 2),
        (201, 640, 256, 3, 128, 1),  # rows that fill no tile; five steps; two tiles in turn
        (201, 640, 256, 3, 128, 2),
        (5, 256, 192, 132, 64, 1),
        (130, 128, 256, 1, 256, 1),
    ],
)
def test_products_of_e4m3(
    num_rows, depth, num_columns, num_sms, tile, halves, interpreted, monkeypatch
):
    monkeypatch.setattr(hopper_tiles, "num_sms", lambda: num_sms)
    monkeypatch.setattr(module, "tile_columns", lambda operands: tile)
    x, kernel = make((num_rows,), depth, halves * num_columns // 2)
    x = x * jnp.exp(jnp.linspace(-3, 3, num_rows))[:, None].astype(x.dtype)  # scales of all sizes
    weight = quantise(kernel.T, "fp8", 1)
    actual = matmul_e4m3(x, weight, halves)
    expected = xla_matmul(x, weight)
    if halves == 2:
        gate, up = jnp.split(expected, 2, axis=-1)
        expected = jax.nn.silu(gate) * up
    assert actual.dtype == jnp.bfloat16
    np.testing.assert_allclose(actual.astype("float32"), expected, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize(
    ("num_rows", "num_columns", "halves", "tile"),
    [
        (128, 4096, 1, 64),  # 32 whole tiles for 132 SMs
        (128, 12288, 2, 128),
        (512, 4096, 1, 128),
        (6144, 4096, 1, 256),
        (6144, 12288, 2, 128),
        (6144, 4160, 1, 64),
        (128, 126_464, 1, 128),  # heads
        (512, 126_464, 1, 256),
        (512, 152_064, 1, 256),
    ],
)
def test_widths_of_tiles(num_rows, num_columns, halves, tile, monkeypatch):
    monkeypatch.setattr(hopper_tiles, "num_sms", lambda: 132)
    x, weight = np.zeros((num_rows, 1)), np.zeros((halves * num_columns, 1))
    assert (
        module.tile_columns(hopper_tiles.Operands(x, weight, x[:, 0], weight[:, 0], halves)) == tile
    )


def test_heads_and_leading_dimensions_of_e4m3(interpreted):
    x, kernel = make((2, 3), 256, 64)
    weight = quantise(kernel.T.reshape(4, 32, 8, 32), "fp8", 2)
    actual = matmul_e4m3(x.reshape(2, 3, 8, 32), weight)
    assert actual.shape == (2, 3, 4, 32)
    expected = xla_matmul(x, quantise(kernel.T, "fp8", 1)).reshape(actual.shape)
    np.testing.assert_allclose(actual.astype("float32"), expected, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("tile", [64, 256])
def test_results_in_float32(tile, interpreted, monkeypatch):
    """As a head's logits are: nothing is rounded."""
    monkeypatch.setattr(module, "tile_columns", lambda operands: tile)
    x, kernel = make((13,), 256, 128)
    weight = quantise(kernel.T, "fp8", 1)
    actual = matmul_e4m3(x, weight, dtype=jnp.float32)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, xla_matmul(x, weight), rtol=1e-5, atol=1e-5)


def test_rounding_in_one_pass(interpreted):
    x, _ = make((9,), 384, 8)
    x = (x * jnp.exp(jnp.linspace(-9, 9, 9))[:, None].astype(x.dtype)).at[3].set(0)
    for a, b in zip(*map(jax.tree.leaves, (quantise_rows(x), quantise(x, "fp8", 1))), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def test_a_row_is_multiplied_alike_in_every_batch(interpreted):
    x, kernel = make((200,), 256, 64)
    weight = quantise(kernel.T, "fp8", 1)
    together = matmul_e4m3(x, weight)
    for rows in (slice(0, 1), slice(7, 70), slice(130, 200)):  # tiles of other widths, too
        np.testing.assert_array_equal(matmul_e4m3(x[rows], weight), together[rows])


def test_what_fits():
    assert swiglu_fits(*make((128,), 64, 128))
    assert swiglu_fits(*make((3, 2, 64), 192, 384))
    for leading, depth, num_columns in [
        ((64,), 64, 128),
        ((3, 100), 64, 128),
        ((), 64, 128),
        ((0,), 64, 128),
        ((128,), 96, 128),
        ((128,), 64, 64),
        ((128,), 64, 192),
    ]:
        arrays = make(leading, depth, num_columns)
        assert not swiglu_fits(*arrays)
        with pytest.raises(ValueError, match="no kernel for"):
            swiglu(*arrays)
    x, gate_up = make((128,), 64, 128)
    assert not swiglu_fits(x.astype("float32"), gate_up)
    assert not swiglu_fits(x, gate_up.astype("float32"))
    assert not swiglu_fits(x.astype("float16"), gate_up.astype("float16"))


@pytest.mark.parametrize(
    "num_rows, num_columns, pays",
    [
        (128, 12288, True),  # one round, of 96 tiles
        (256, 12288, False),  # 192 tiles in two rounds of 132
        (512, 12288, True),  # 384 in three
        (768, 12288, False),  # 576 in five
        (1024, 12288, True),  # 768 in six
        (6144, 12288, True),  # 4608 in 35
        (128, 18944, False),  # 148 in two
        (512, 18944, True),  # 592 in five
    ],
)
def test_rounds_of_tiles_should_be_full(num_rows, num_columns, pays, monkeypatch):
    monkeypatch.setattr(hopper_tiles, "num_sms", lambda: 132)
    shapes = [((2, num_rows // 2, 64), jnp.bfloat16), ((64, 2 * num_columns), jnp.bfloat16)]
    assert swiglu_pays(*(jnp.zeros(*shape) for shape in shapes)) == pays


def test_sms_are_counted_on_the_mesh_before_the_machine(monkeypatch):
    class Device:
        core_count = 114
        num_cores = 78

    class Mesh:
        abstract_device = Device()

    assert hopper_tiles.num_sms() >= 1
    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    assert hopper_tiles.num_sms() == 114
    monkeypatch.setattr(jax, "local_devices", lambda: [object()])
    assert hopper_tiles.num_sms() == 132
    monkeypatch.setattr(jax.sharding, "get_abstract_mesh", Mesh)
    assert hopper_tiles.num_sms() == 78
