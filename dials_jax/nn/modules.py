"""NNX for definition, plain trees for execution.

A module is split once into its graph and a nested dict of arrays. Below that line there is only
`jax.jit`, `lax.scan` and trees, which costs the host a fraction of what `nnx.jit` does and keeps
NNX's own types out of checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
from flax import nnx

from dials_jax.trees import Params

Make = Callable[..., nnx.Module]  # a class, or a function that chooses one; it takes `rngs`


def init_module(make: Make, key: jax.Array, *args: Any, **kwargs: Any) -> Params:
    """Random parameters of the module `make(*args, rngs, **kwargs)`."""
    return nnx.to_pure_dict(nnx.state(make(*args, rngs=nnx.Rngs(key), **kwargs)))


def init_stacked(make: Make, key: jax.Array, num_layers: int, *args: Any, **kwargs: Any) -> Params:
    """Independent draws for `num_layers` modules, stacked along a leading axis."""
    keys = jax.random.split(key, num_layers)
    return jax.vmap(lambda key: init_module(make, key, *args, **kwargs))(keys)


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
