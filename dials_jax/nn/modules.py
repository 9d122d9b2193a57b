"""Modules and their parameters: how they begin, the form they take for execution, how they run.

NNX defines modules; plain trees are executed. A module is split once into its graph and a nested
dict of arrays. Below that line there is only `jax.jit`, `lax.scan` and trees, which costs the host
a fraction of what `nnx.jit` does and keeps NNX's own types out of checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dials_jax.config import ModelConfig
from dials_jax.trees import Params

Make = Callable[..., nnx.Module]  # a class, or a function that chooses one; it takes `rngs`


# ------------------------------------------------------------------ initial values


def normal(
    rngs: nnx.Rngs, shape: tuple[int, ...], scale: float = 0.02, depth: int | None = None
) -> Float[Array, "..."]:
    """Truncated normal; `depth` scales writers to the residual stream by 1/sqrt(2 * depth)."""
    scale = scale if depth is None else scale / (2 * depth) ** 0.5
    return scale * jax.random.truncated_normal(rngs.params(), -3, 3, shape)


def residual_depth(cfg: ModelConfig) -> int | None:
    """The `depth` of writers to the residual stream; none where gates open from zero."""
    return None if cfg.cond_dim else cfg.num_layers


def zeros_if(present: bool, shape: tuple[int, ...]) -> nnx.Param | None:
    """A bias that starts at zero, or no bias."""
    return nnx.Param(jnp.zeros(shape)) if present else None


def init_module(make: Make, key: jax.Array, *args: Any, **kwargs: Any) -> Params:
    """Random parameters of the module `make(*args, rngs, **kwargs)`."""
    return nnx.to_pure_dict(nnx.state(make(*args, rngs=nnx.Rngs(key), **kwargs)))


def init_stacked(make: Make, key: jax.Array, num_layers: int, *args: Any, **kwargs: Any) -> Params:
    """Independent draws for `num_layers` modules, stacked along a leading axis."""
    keys = jax.random.split(key, num_layers)
    return jax.vmap(lambda key: init_module(make, key, *args, **kwargs))(keys)


# ------------------------------------------------------------------------ execution


@jax.tree_util.register_static
@dataclass(frozen=True)
class Form:
    """What was done to the parameters since they were initialised or read.

    It stands with them as `params["form"]`, a part of the tree's structure without a leaf; a tree
    without it is in the plain form, in which models are trained and saved. Whether layers are
    stacked or unrolled shows in their type: see `dials_jax.trees`.

    Attributes:
      fused: matmuls of one input are joined, in so many parts: see `dials_jax.nn.fusing`.
        0: they are not.
      modulated: the modulations of a constant are there: see `dials_jax.nn.modulation`.
      padded_head: the head's kernel is there once more, padded to whole tiles.
    """

    fused: int = 0
    modulated: bool = False
    padded_head: bool = False


PLAIN = Form()


def form_of(params: Params) -> Form:
    """The form of a whole model's parameters."""
    return params.get("form", PLAIN)


def bind(make: Make, params: Params, *args: Any, **kwargs: Any) -> Any:
    """The module `make(*args, rngs, **kwargs)` with these parameters.

    Args:
      args, kwargs: hashable.
    """
    return nnx.merge(_graph(make, *args, **kwargs), params)


@cache
def _graph(make: Make, *args: Any, **kwargs: Any) -> nnx.GraphDef:
    module = nnx.eval_shape(lambda: make(*args, rngs=nnx.Rngs(0), **kwargs))
    return nnx.split(module)[0]
