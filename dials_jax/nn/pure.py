"""NNX for definition, plain trees for execution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from dials_jax.trees import Params


class Pure:
    """An NNX module as a pair of pure functions over a nested dict of arrays.

    The module is split once. Below that line there is only `jax.jit`, `lax.scan` and trees, which
    costs the host a fraction of what `nnx.jit` does and keeps NNX's own types out of checkpoints.
    """

    def __init__(self, make: Callable[[nnx.Rngs], nnx.Module]):
        self._make = make
        self._graph, _ = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))

    def init(self, key: jax.Array) -> Params:
        return nnx.to_pure_dict(nnx.state(self._make(nnx.Rngs(key))))

    def init_stack(self, key: jax.Array, num_layers: int) -> Params:
        """Independent draws for `num_layers` copies, stacked along a leading axis."""
        return jax.vmap(self.init)(jax.random.split(key, num_layers))

    def __call__(self, params: Params, *args: Any, method: str = "__call__", **kwargs: Any) -> Any:
        return getattr(nnx.merge(self._graph, params), method)(*args, **kwargs)
