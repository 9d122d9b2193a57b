"""The first implementation that fits runs, unless another is forced."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from dials_jax.errors import InputError
from dials_jax.models.transformer import head_logits, prepare_for_inference
from dials_jax.nn import attention, mlp
from dials_jax.nn.eight_bits import quantise, quantise_modules
from dials_jax.nn.fusing import fuse
from dials_jax.nn.kernels import dispatch, hopper_attention, hopper_matmul, per_device
from dials_jax.nn.kernels.implementation import NAMES, check_kernel_choice, pick
from dials_jax.nn.kernels.implementation import dispatch as run_dispatch
from dials_jax.nn.kv import KV
from dials_jax.nn.linear import MATMUL_8, SPLIT_PRODUCT, linear
from dials_jax.nn.mask import Mask
from dials_jax.nn.norm import RMS_NORM
from tests.conftest import init_params, small_config

OPERATIONS = (
    *(dispatch.ATTENTION, dispatch.SWIGLU, dispatch.LOOKUP),
    *(MATMUL_8, RMS_NORM, SPLIT_PRODUCT),
)


@pytest.fixture
def taken(monkeypatch):
    """Names of the kernels that were called, on what passes for a Hopper GPU."""
    names = []

    def window_attention(q, kv, valid):
        names.append("attention")
        return q

    def swiglu(x, gate_up):
        names.append("swiglu")
        return jnp.zeros((*x.shape[:-1], gate_up.shape[1] // 2), x.dtype)

    def matmul_e4m3(x, weight, halves=1, dtype="bfloat16"):
        names.append("matmul" if halves == 1 else "swiglu")
        columns = weight.scales.shape if halves == 1 else (weight.scales.size // 2,)
        return jnp.zeros((*x.shape[: x.ndim - weight.num_summed], *columns), dtype)

    monkeypatch.setattr(per_device, "on_hopper", lambda: True)
    monkeypatch.setattr(hopper_attention, "window_attention", window_attention)
    monkeypatch.setattr(hopper_matmul, "matmul_e4m3", matmul_e4m3)
    monkeypatch.setattr(hopper_matmul, "swiglu", swiglu)
    return names


def test_every_name_can_be_forced():
    assert {one.name for ops in OPERATIONS for one in ops} == set(NAMES)


def test_a_cpu_is_no_hopper():
    assert not per_device.on_hopper()


@pytest.mark.parametrize(
    "num_queries, num_keys, head_dim, dtype, how, expected",
    [
        (16, 192, 128, "bfloat16", {}, ["attention"]),
        (64, 192, 128, "bfloat16", {"valid": True}, ["attention"]),
        (72, 192, 128, "bfloat16", {}, []),  # more queries than a tile holds
        (64, 64, 128, "bfloat16", {}, []),  # no window: training, which needs gradients
        (16, 192, 64, "bfloat16", {}, []),
        (16, 192, 128, "float32", {}, []),
        (16, 192, 128, "bfloat16", {"positions": True}, []),  # queries that see to their left only
    ],
)
def test_attention_of_a_window(taken, num_queries, num_keys, head_dim, dtype, how, expected):
    q = jnp.ones((2, num_queries, 2, head_dim), dtype)
    kv = KV(*(jnp.ones((2, num_keys, 2, head_dim), dtype) for _ in range(2)))
    valid = jnp.ones((2, num_keys), bool) if "valid" in how else None
    mask = Mask(valid)
    if "positions" in how:
        mask = Mask(valid, causal=True).at(jnp.tile(jnp.arange(num_queries), (2, 1)))
    out = jax.eval_shape(lambda q, kv: attention.attend(q, kv, mask), q, kv)
    assert out.shape == q.shape and taken == expected


@pytest.mark.parametrize(
    "num_rows, dtype, fused, expected",
    [
        (4, "bfloat16", 1, ["swiglu"]),
        (3, "bfloat16", 1, []),  # no whole tiles of rows
        (4, "float32", 1, []),
        (4, "bfloat16", 0, []),
        (4, "bfloat16", 2, []),  # in two parts, each for a device
    ],
)
def test_swiglu_of_fused_products(taken, num_rows, dtype, fused, expected):
    cfg = small_config(d_model=64, d_ff=128, dtype=dtype)
    module = mlp.MLP(cfg, nnx.Rngs(0), fused)
    nnx.update(module, jax.tree.map(lambda x: x.astype(dtype), nnx.state(module)))
    hidden = jax.eval_shape(module.hidden, jnp.ones((num_rows, 32, 64), dtype))
    assert hidden.shape == (num_rows, 32, 128) and taken == expected


@pytest.mark.parametrize(
    "kind, dtype, depth, columns, expected",
    [
        ("fp8", "bfloat16", 128, 192, ["matmul"]),
        ("fp8", "float32", 128, 192, []),  # as tests do
        ("int8", "bfloat16", 128, 192, []),
        ("fp8", "bfloat16", 64, 192, []),
        ("fp8", "bfloat16", 128, 96, []),
    ],
)
def test_products_in_8_bits(taken, kind, dtype, depth, columns, expected):
    x = jnp.ones((3, 5, depth), dtype)  # any number of rows
    weight = quantise(jnp.ones((columns // 8, 8, depth)), kind, 1)  # heads of 8
    out = jax.eval_shape(lambda x: linear(x, weight), x)
    assert out.shape == (3, 5, columns // 8, 8) and out.dtype == dtype and taken == expected


@pytest.mark.parametrize("vocab_size", [128, 126_464, 152_064, 100])  # the last one is padded
def test_the_head_in_8_bits(taken, vocab_size):
    """Its logits are float32 as they leave the kernel."""
    cfg = small_config(d_model=128, vocab_size=vocab_size, dtype="bfloat16")

    def logits(h):
        kernel = quantise(jnp.ones((vocab_size, 128)), "fp8", 1)
        params = {"head": {"kernel": kernel}, "final_norm": {"scale": jnp.ones(128)}, "layers": ()}
        return head_logits(cfg, prepare_for_inference(cfg, params), h)

    out = jax.eval_shape(logits, jnp.ones((3, 5, 128), "bfloat16"))
    assert (out.shape, out.dtype, taken) == ((3, 5, vocab_size), "float32", ["matmul"])


@pytest.mark.parametrize("fused, expected", [(1, ["swiglu"]), (0, ["matmul"] * 2)])
def test_swiglu_in_8_bits(taken, fused, expected):
    cfg = small_config(d_model=128, d_ff=128, dtype="bfloat16")
    layer = jax.tree.map(lambda x: x[0], init_params(cfg)["layers"])
    layer = quantise_modules(layer, "fp8")
    module = mlp.MLP(cfg, nnx.Rngs(0), fused)
    nnx.update(module, nnx.State((fuse(layer) if fused else layer)["mlp"]))
    hidden = jax.eval_shape(module.hidden, jnp.ones((3, 5, 128), "bfloat16"))
    assert hidden.shape == (3, 5, 128) and taken == expected


def some_attention(**how):
    q = jnp.ones((1, 16, 1, 128), "bfloat16")
    kv = KV(*jnp.ones((2, 1, 192, 1, 128), "bfloat16"))
    return jax.eval_shape(lambda q, kv: attention.attend(q, kv, **how), q, kv)


def test_another_implementation_can_be_forced(taken, monkeypatch):
    some_attention()
    some_attention(implementation="xla")
    assert taken == ["attention"]
    monkeypatch.setenv("DIALS_KERNELS", "xla")
    some_attention()
    assert taken == ["attention"]
    some_attention(implementation="hopper_window")  # the argument goes before the environment
    assert taken == ["attention"] * 2
    monkeypatch.setenv("DIALS_KERNELS", "hopper_swiglu")  # says nothing about attention
    some_attention()
    assert taken == ["attention"] * 3


def test_xla_forces_every_operation(taken, monkeypatch):
    monkeypatch.setenv("DIALS_KERNELS", "xla")
    names = {ops: pick(ops, "anything").name for ops in OPERATIONS}
    assert set(names.values()) == {"xla"}


def test_each_operation_is_forced_by_its_own_name(monkeypatch):
    monkeypatch.setattr(per_device, "on_hopper", lambda: True)
    monkeypatch.setenv("DIALS_KERNELS", "xla,hopper_swiglu")
    x, gate_up = jnp.ones((4, 32, 64), "bfloat16"), jnp.ones((64, 256), "bfloat16")
    assert pick(dispatch.SWIGLU, x, (gate_up,), (None,)).name == "xla"  # named first


def test_one_can_be_left_out(taken, monkeypatch):
    monkeypatch.setenv("DIALS_KERNELS", "-hopper_window")
    some_attention()
    assert taken == []
    some_attention(implementation="hopper_window")  # the argument goes before the environment
    assert taken == ["attention"]
    monkeypatch.setenv("DIALS_KERNELS", "-hopper_window,-cudnn,-xla")
    with pytest.raises(InputError, match=r"DIALS_KERNELS leaves out all that fits of .*cudnn.*xla"):
        some_attention()


@pytest.mark.parametrize("value", ["xlaa", "xla,cudn", "-cudn"])
def test_an_unknown_name_is_refused(value, monkeypatch):
    monkeypatch.setenv("DIALS_KERNELS", value)
    with pytest.raises(InputError, match=r"DIALS_KERNELS: .* did you mean '(xla|cudnn)'"):
        some_attention()
    with pytest.raises(InputError, match=r"DIALS_KERNELS: .* did you mean '(xla|cudnn)'"):
        check_kernel_choice()  # before a model is placed, and before a training reads its data
    with pytest.raises(InputError, match="implementation='xlaa' is unknown; did you mean 'xla'"):
        some_attention(implementation="xlaa")


@pytest.mark.parametrize("name, reason", [
    ("cudnn", "it needs a GPU"), ("hopper_window", "Hopper"), ("tpu_splash", "TPUs"),
])  # fmt: skip
def test_what_does_not_fit_says_why(name, reason, monkeypatch):
    with pytest.raises(InputError, match=f"'{name}' does not fit: .*{reason}"):
        some_attention(implementation=name)
    monkeypatch.setenv("DIALS_KERNELS", name)
    with pytest.raises(InputError, match=f"DIALS_KERNELS={name} does not fit: .*{reason}") as error:
        some_attention()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("fused, biased", [(0, False), (1, True)])
def test_swiglu_that_cannot_be_forced_says_why(fused, biased, monkeypatch):
    monkeypatch.setattr(per_device, "on_hopper", lambda: True)
    monkeypatch.setenv("DIALS_KERNELS", "hopper_swiglu")
    module = mlp.MLP(small_config(d_model=64, d_ff=128, mlp_bias=biased), nnx.Rngs(0), fused)
    with pytest.raises(InputError, match="fused kernels of gate and up, and no biases"):
        module(jnp.ones((4, 32, 64)))


def test_the_table_is_looked_up_whole_without_a_mesh():
    with pytest.raises(InputError, match="no mesh splits the table"):
        run_dispatch(
            dispatch.LOOKUP, jnp.ones((4, 2)), jnp.zeros((1, 2), int), "float32",
            implementation="sharded",
        )  # fmt: skip
