"""Which implementation of an operation runs: the first of its list that fits.

The last of every list is plain JAX: it says what the operation computes, and fits always.
`DIALS_KERNELS=xla` in the environment, or the argument `implementation`, forces one by its name.
The environment may name several, separated by commas: in each list the one that it has is forced;
in a list without any of them, the first that fits runs. It is read when a program is traced.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dials_jax.errors import nearest, require
from dials_jax.nn.kernels.cudnn_attention import cudnn_refusal, run_cudnn
from dials_jax.nn.kernels.hopper_attention import run_window, window_refusal
from dials_jax.nn.kernels.hopper_swiglu import run_swiglu, swiglu_refusal
from dials_jax.nn.kernels.per_device import ANY, GPU, HOPPER, TPU, Device
from dials_jax.nn.kernels.sharded_lookup import lookup_refusal, sharded_lookup
from dials_jax.nn.kernels.tpu_attention import run_splash, splash_refusal
from dials_jax.nn.kv import KV
from dials_jax.nn.linear import Weight, linear
from dials_jax.nn.mask import Mask

VARIABLE = "DIALS_KERNELS"


class Implementation(NamedTuple):
    """One way to compute an operation.

    Attributes:
      device: that it is written for.
      limits: of the same arguments as `run`: why it cannot take them on its device; None: it can.
    """

    name: str
    device: Device
    limits: Callable[..., str | None]
    run: Callable[..., Any]

    def refusal(self, *args: Any) -> str | None:
        """Why it cannot run here; None: it fits."""
        if not self.device.is_here():
            return f"it needs {self.device.name}"
        return self.limits(*args)


def xla_attention(q: Float[Array, "B T N H"], kv: KV, mask: Mask) -> Float[Array, "B T N H"]:
    causal, attn_mask = mask.flag_and_array(q.shape[1], kv.k.shape[1])
    return jax.nn.dot_product_attention(q, *kv, mask=attn_mask, is_causal=causal)


def xla_swiglu(
    x: Float[Array, "B T D"], kernels: tuple[Weight, ...], biases: tuple[Weight | None, ...]
) -> Float[Array, "B T F"]:
    """silu(x W_gate + b_gate) * (x W_up + b_up), from both kernels or from one of both."""
    halves = [linear(x, kernel, bias) for kernel, bias in zip(kernels, biases, strict=True)]
    gate, up = halves if len(halves) == 2 else jnp.split(halves[0], 2, axis=-1)
    return jax.nn.silu(gate) * up


def xla_lookup(
    table: Float[Array, "V D"], tokens: Int[Array, "B T"], dtype: str
) -> Float[Array, "B T D"]:
    """`table[tokens]`, looked up first and rounded after: see `nn.kernels.sharded_lookup`."""
    return table[tokens].astype(dtype)


def _none(*args: Any) -> None:
    """No limits."""


ATTENTION = (  # (q, kv, mask) -> values
    Implementation("tpu_splash", TPU, splash_refusal, run_splash),
    Implementation("hopper_window", HOPPER, window_refusal, run_window),
    Implementation("cudnn", GPU, cudnn_refusal, run_cudnn),
    Implementation("xla", ANY, _none, xla_attention),
)
SWIGLU = (  # (x, kernels, biases), two kernels or both joined in one -> hidden units
    Implementation("hopper_swiglu", HOPPER, swiglu_refusal, run_swiglu),
    Implementation("xla", ANY, _none, xla_swiglu),
)
LOOKUP = (  # (table, tokens, dtype) -> embeddings
    Implementation("sharded", ANY, lookup_refusal, sharded_lookup),
    Implementation("xla", ANY, _none, xla_lookup),
)
NAMES = tuple(dict.fromkeys(x.name for x in (*ATTENTION, *SWIGLU, *LOOKUP)))


def dispatch(
    implementations: tuple[Implementation, ...], *args: Any, implementation: str | None = None
) -> Any:
    """Runs the first implementation that fits the arguments, or the one that is forced.

    Args:
      implementation: the name of the one to run; None: chosen by the environment.

    Raises: InputError for an unknown name, and for one that is forced and does not fit.
    """
    return pick(implementations, *args, implementation=implementation).run(*args)


def pick(
    implementations: tuple[Implementation, ...], *args: Any, implementation: str | None = None
) -> Implementation:
    """The implementation that `dispatch` runs."""
    by_name = {x.name: x for x in implementations}
    if implementation is None:
        name = next((name for name in names_in_environment() if name in by_name), None)
        where = f"{VARIABLE}={name}"
    else:
        name, where = implementation, f"implementation={implementation!r}"
        require(name in by_name, f"{where} is unknown{nearest(name, by_name)}")
    if name is None:
        return next(x for x in implementations if x.refusal(*args) is None)
    why = by_name[name].refusal(*args)
    require(why is None, f"{where} does not fit: {why}; 'xla' always does")
    return by_name[name]


def names_in_environment() -> list[str]:
    """Raises: InputError for an unknown name."""
    names = [name for name in os.environ.get(VARIABLE, "").split(",") if name]
    for name in names:
        require(name in NAMES, f"{VARIABLE}: {name!r} is unknown{nearest(name, NAMES)}")
    return names
