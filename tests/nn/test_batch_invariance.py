"""In the batch-invariant mode a row's sum has one order, whatever the batch and its place there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dials_jax.compiling import batch_invariant, compiler_options
from dials_jax.errors import InputError
from dials_jax.nn import linear, norm, rope
from dials_jax.nn.eight_bits import quantise
from dials_jax.nn.kernels import dispatch, hopper_rows, implementation, per_device, row_sums
from dials_jax.nn.kernels.hopper_attention import window_attention
from dials_jax.nn.kernels.implementation import pick
from dials_jax.nn.kernels.tiles import tiled_attention, tiled_matmul_8, tiled_product
from dials_jax.nn.kv import KV
from dials_jax.nn.mask import Mask

PARTS = (slice(0, 1), slice(2, 5), slice(33, 41), slice(7, 39))  # 1, 3, 8 and 32 rows
LISTS = (
    dispatch.ATTENTION, dispatch.SWIGLU, dispatch.LOOKUP, linear.PRODUCT, linear.MATMUL_8,
    norm.RMS_NORM, norm.STANDARDISE, rope.ROPE,
    row_sums.SUM, row_sums.LOGSUMEXP, row_sums.LOG_SOFTMAX, row_sums.SOFTMAX,
)  # fmt: skip


def normal(seed, *shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def assert_alike_in_every_batch(fn, x):
    together = jax.jit(fn)(x)
    for rows in PARTS:
        np.testing.assert_array_equal(jax.jit(fn)(x[rows]), together[rows])
    return together


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_kernel_multiplies_a_row_alike_in_every_batch(interpreted, dtype):
    x, weight = normal(0, 41, 256, dtype="bfloat16"), normal(1, 256, 64, dtype="bfloat16")
    found = assert_alike_in_every_batch(
        lambda x: hopper_rows.multiply_rows(x, weight, dtype=jnp.dtype(dtype)), x
    )
    exact = x.astype("float32") @ weight.astype("float32")
    assert found.dtype == dtype
    np.testing.assert_allclose(found.astype("float32"), exact, rtol=2**-8, atol=1e-4)


def test_the_kernel_norms_a_row_alike_in_every_batch(interpreted):
    x, scale = normal(0, 41, 256, dtype="bfloat16"), normal(1, 256)
    found = assert_alike_in_every_batch(lambda x: hopper_rows.norm_rows(x, scale, eps=1e-5), x)
    np.testing.assert_array_equal(found, norm.xla_rms_norm(x, scale, 1e-5))


def test_the_kernel_makes_swiglu_of_a_row_alike_in_every_batch(interpreted):
    x, weight = normal(0, 41, 128, dtype="bfloat16"), normal(1, 128, 128, dtype="bfloat16")
    assert_alike_in_every_batch(lambda x: hopper_rows.swiglu_rows(x, weight), x)


def test_the_kernel_attends_alike_in_every_batch_and_behind_padding():
    plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu", exc_type=ImportError)
    if not hasattr(plgpu, "InterpretGPUParams"):
        pytest.skip("no interpreter")
    q, k, v = (normal(i, 2, n, 1, 128, dtype="bfloat16") for i, n in enumerate((72, 136, 136)))
    valid = jnp.arange(136) >= jnp.asarray([[70], [0]])  # more than a tile of padding

    def attend(*args):
        q, k, v, valid = args
        return window_attention(q, KV(k, v), valid, interpret=True)

    both = attend(q, k, v, valid)
    expected = tiled_attention(q.astype("float32"), KV(k, v), Mask(valid))
    np.testing.assert_allclose(both.astype("float32"), expected, atol=0.01)
    for rows in (slice(0, 1), slice(1, 2)):
        np.testing.assert_array_equal(attend(q[rows], k[rows], v[rows], valid[rows]), both[rows])
    less = attend(q[:1], k[:1, 64:], v[:1, 64:], valid[:1, 64:])
    np.testing.assert_array_equal(less, both[:1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tiles_multiply_a_row_alike_in_every_batch(dtype):
    x, weight = normal(0, 41, 96, dtype=dtype), normal(1, 96, 48, dtype=dtype)
    found = assert_alike_in_every_batch(lambda x: tiled_product(x, weight, "RD,DF->RF", None), x)
    np.testing.assert_allclose(
        found.astype("float32"), (x @ weight).astype("float32"), rtol=0.02, atol=0.02
    )


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_tiles_multiply_8_bits_alike_in_every_batch(kind):
    weight = quantise(normal(1, 3, 16, 96), kind, 1)
    found = assert_alike_in_every_batch(lambda x: tiled_matmul_8(x, weight), normal(0, 41, 96))
    assert found.shape == (41, 3, 16)


@pytest.mark.parametrize("depth", [1, 7, 64, 96, 1000])
def test_a_row_is_summed_alike_in_every_batch_and_behind_zeros(depth):
    x = normal(0, 41, depth)
    found = assert_alike_in_every_batch(row_sums.ordered_sum, x)
    np.testing.assert_allclose(found, x.sum(-1), rtol=1e-4, atol=1e-4)
    behind = jnp.pad(x, ((0, 0), (70, 0)))
    np.testing.assert_array_equal(jax.jit(row_sums.ordered_sum)(behind), found)


def test_softmax_in_order_is_softmax():
    x = normal(0, 5, 200).at[:, 3].set(-jnp.inf)
    with batch_invariant(True):
        found = (
            row_sums.row_softmax(x),
            row_sums.row_log_softmax(x),
            row_sums.logsumexp(x, keepdims=True),
        )
    expected = jax.nn.softmax(x), jax.nn.log_softmax(x), jax.nn.logsumexp(x, -1, keepdims=True)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_positions_turn_in_tiles_of_one_shape():
    """Outside of them a CPU's compiler may round a product, or not, by what else is in the loop."""
    x, angles = normal(0, 3, 15, 2, 8), rope.rope_angles(jnp.arange(45).reshape(3, 15), 8, 1e4)
    with batch_invariant(True):
        found = rope.apply_rope(x, angles)
        program = jax.make_jaxpr(rope.apply_rope)(x, angles)
    np.testing.assert_allclose(found, rope.apply_rope(x, angles), rtol=1e-6, atol=1e-6)
    used = {step.primitive.name for step in program.jaxpr.eqns}
    assert "scan" in used and not used & {"add", "mul", "sub"}
    assert found.dtype == x.dtype


ONE = jnp.ones(64)
OF_ROWS = {
    "logsumexp": row_sums.logsumexp,
    "softmax": row_sums.row_softmax,
    "log_softmax": row_sums.row_log_softmax,
    "rms": lambda x: implementation.dispatch(norm.RMS_NORM, jnp.maximum(x, -9.0), ONE, 1e-5),
    "layer": lambda x: implementation.dispatch(norm.STANDARDISE, jnp.maximum(x, -9.0), 1e-5),
}


@pytest.mark.parametrize("name", OF_ROWS)
def test_rows_do_not_depend_on_how_many_there_are(name):
    """`exp` and norms have other bits in other loops, by XLA on a CPU."""
    x = normal(0, 8, 13, 64) * 3

    def fn(x):  # fused with what is before
        return OF_ROWS[name](jnp.where(jnp.arange(64) == 63, -jnp.inf, x))

    with batch_invariant(True):
        together = jax.jit(fn)(x)
        for count in (1, 2, 3, 5):
            np.testing.assert_array_equal(jax.jit(fn)(x[:count]), together[:count])


def test_few_positions_turn_in_a_loop_too():
    """XLA takes the only turn of a loop out of it, and fuses it with what is around."""
    x, angles = normal(0, 1, 9, 2, 8), rope.rope_angles(jnp.arange(9)[None], 8, 1e4)
    with batch_invariant(True):
        program = jax.jit(rope.apply_rope).lower(x, angles).compile()
    assert " while(" in program.as_text()


def test_tiles_attend_alike_in_every_batch_and_behind_padding():
    q, k, v = (normal(i, 3, n, h, 8) for i, n, h in ((0, 40, 4), (1, 70, 2), (2, 70, 2)))
    valid = jnp.arange(70) >= jnp.asarray([[0], [64], [3]])
    attend = jax.jit(lambda q, k, v, valid: tiled_attention(q, KV(k, v), Mask(valid)))
    found = attend(q, k, v, valid)
    expected = dispatch.xla_attention(q, KV(k, v), Mask(valid))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    for i in range(3):
        one = slice(i, i + 1)
        np.testing.assert_array_equal(attend(q[one], k[one], v[one], valid[one]), found[one])
    less = attend(q[1:2], k[1:2, 64:], v[1:2, 64:], valid[1:2, 64:])
    np.testing.assert_array_equal(less, found[1:2])


@pytest.mark.parametrize(
    "axes, ndim, expected",
    [
        ("...D,DF->...F", 2, 1),
        ("BTNH,NHD->BTD", 3, 2),
        ("BTD,DNH->BTNH", 3, 1),
        ("...C,...CED->...ED", 3, 1),
        ("...C,...CED->...ED", 4, None),  # of all layers
        ("CV,DV->CD", 2, None),  # the weight's last axis
        ("BTD,DF->BFT", 2, None),
    ],
)
def test_which_einsums_are_products_of_rows(axes, ndim, expected):
    found = hopper_rows.as_rows(axes, ndim)
    assert (found.num_summed if found else None) == expected


def test_the_mode_chooses_only_what_has_one_order(monkeypatch):
    monkeypatch.setattr(per_device, "on_hopper", lambda: True)
    monkeypatch.setattr(per_device, "on_gpu", lambda: True)
    x, weight = normal(0, 2, 3, 128, dtype="bfloat16"), normal(1, 128, 64, dtype="bfloat16")
    q = normal(0, 2, 16, 1, 128, dtype="bfloat16")
    kv = KV(*[normal(1, 2, 192, 1, 128, dtype="bfloat16")] * 2)
    calls = [
        (linear.PRODUCT, (x, weight, "BTD,DF->BTF", None)),
        (dispatch.SWIGLU, (x, (jnp.tile(weight, (1, 2)),), (None,), 1)),
        (dispatch.ATTENTION, (q, kv, Mask())),
        (norm.RMS_NORM, (x, weight[:, 0], 1e-5)),
    ]
    fast = [pick(ops, *args).name for ops, args in calls]
    assert fast == ["xla", "xla", "hopper_window", "xla"]
    with batch_invariant(True):
        assert {pick(ops, *args).name for ops, args in calls} == {"hopper_rows"}
        single = (x.astype("float32"), weight.astype("float32"), "BTD,DF->BTF", None)
        assert pick(linear.PRODUCT, *single).name == "tiles"
        assert pick(dispatch.ATTENTION, q, kv, Mask(causal=True)).name == "tiles"


def test_every_operation_has_what_fits_always_in_both_modes(monkeypatch):
    for mode, other in ((False, "invariant"), (True, "by default")):
        with batch_invariant(mode):
            for ops in LISTS:
                assert any(x.device is per_device.ANY and x.when != other for x in ops)


def test_a_kernel_without_one_order_cannot_be_forced_in_the_mode(monkeypatch):
    x = normal(0, 4, 8)
    monkeypatch.setenv("DIALS_KERNELS", "xla")
    with batch_invariant(True), pytest.raises(InputError, match="depend on the batch") as error:
        row_sums.row_sum(x)
    assert "\n" not in str(error.value)
    monkeypatch.setenv("DIALS_KERNELS", "tiles")
    with pytest.raises(InputError, match="batch_invariant=True"):
        row_sums.row_sum(x)


def test_the_mode_is_part_of_what_is_traced_and_compiled():
    traced = []

    @jax.jit
    def fn(x):
        traced.append(batch_invariant.value)
        return x

    for mode in (False, True, False, True):
        with batch_invariant(mode):
            fn(1)
            rounds = (compiler_options() or {}).get("xla_allow_excess_precision")
            assert rounds is (False if mode else None)
    assert traced == [False, True]
