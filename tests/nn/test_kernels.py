"""The kernels for Hopper are taken for what they can do, and for nothing else."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from dials_jax.nn import attention, mlp
from dials_jax.nn.kernels import per_device
from dials_jax.nn.kv import KV
from tests.conftest import small_config


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

    monkeypatch.setattr(attention, "on_hopper", lambda: True)
    monkeypatch.setattr(mlp, "on_hopper", lambda: True)
    monkeypatch.setattr(attention, "window_attention", window_attention)
    monkeypatch.setattr(mlp, "swiglu", swiglu)
    return names


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
        (16, 192, 128, "bfloat16", {"index": True}, []),  # queries that see to their left only
    ],
)
def test_attention_of_a_window(taken, num_queries, num_keys, head_dim, dtype, how, expected):
    q = jnp.ones((2, num_queries, 2, head_dim), dtype)
    kv = KV(*(jnp.ones((2, num_keys, 2, head_dim), dtype) for _ in range(2)))
    valid = jnp.ones((2, num_keys), bool) if "valid" in how else None
    index = jnp.broadcast_to(jnp.arange(num_queries), (2, num_queries)) if "index" in how else None
    out = attention.attend(q, kv, valid, index)
    assert out.shape == q.shape and taken == expected


@pytest.mark.parametrize(
    "num_rows, dtype, fused, expected",
    [
        (4, "bfloat16", True, ["swiglu"]),
        (3, "bfloat16", True, []),  # no whole tiles of rows
        (4, "float32", True, []),
        (4, "bfloat16", False, []),
    ],
)
def test_swiglu_of_fused_products(taken, num_rows, dtype, fused, expected):
    cfg = small_config(d_model=64, d_ff=128, dtype=dtype)
    module = mlp.MLP(cfg, nnx.Rngs(0), fused)
    nnx.update(module, jax.tree.map(lambda x: x.astype(dtype), nnx.state(module)))
    hidden = module.hidden(jnp.ones((num_rows, 32, 64), dtype))
    assert hidden.shape == (num_rows, 32, 128) and taken == expected
