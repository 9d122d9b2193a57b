"""Which layers run: the policies full (None), static, random and routed.

Each is a pytree, so it enters compiled functions as an argument, and implements
`dials_jax.nn.stack.Policy`. Layers count from 0. Rows always decide alone: a row's gates come from
its own tokens, hidden states and key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Number
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from dials_jax import trees
from dials_jax.config import INT32, Range, Typed, as_type, require
from dials_jax.nn.stack import Denoising
from dials_jax.skipping.gumbel import gumbel_votes, straight_through_threshold
from dials_jax.skipping.router import SKIP, apply_router, skip_share, votes_to_skip


def _static(**kwargs):
    return field(metadata={"static": True}, **kwargs)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Static:
    """Skips the same layers at every step (Goel et al. 2026)."""

    layers: Sequence[int] = _static()  # kept as a sorted tuple, each once

    def __post_init__(self):
        layers = list(self.layers) if isinstance(self.layers, set | frozenset) else self.layers
        layers = as_type(tuple[int, ...], layers, "layers")
        object.__setattr__(self, "layers", tuple(sorted(set(layers))))

    def check(self, num_layers: int) -> None:
        """Raises: InputError for a layer that a model of so many does not have."""
        for layer in self.layers:
            require(
                0 <= layer < num_layers,
                f"Static: layer {layer} does not exist; layers count from 0 to {num_layers - 1}",
            )

    def plan(self, num_layers: int, denoising: Denoising) -> np.ndarray:
        self.check(num_layers)
        return ~np.isin(np.arange(num_layers), self.layers)

    def gate(self, plan: Array | np.bool_, h: Array, denoising: Denoising) -> Array | np.bool_:
        return plan


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Random:
    """Skips `num_skipped` random layers (at most all), drawn anew for every row and step.

    The number is an argument of compiled programs: one program serves all numbers.
    """

    num_skipped: Any  # an integer; JAX also builds the class around tracers and shapes

    def __post_init__(self):
        if isinstance(self.num_skipped, Number | str | bytes | list | tuple | dict | set):
            number = as_type(Annotated[int, Range(0, INT32.high)], self.num_skipped, "num_skipped")
            object.__setattr__(self, "num_skipped", number)

    def plan(self, num_layers: int, denoising: Denoising) -> Bool[Array, "L B"]:
        require(self.num_skipped is not None, "Random: num_skipped is None; give how many layers")

        def row(key):
            order = jax.random.permutation(jax.random.fold_in(key, denoising.step), num_layers)
            return order >= self.num_skipped

        return jax.vmap(row)(denoising.row_keys).T

    def gate(self, plan: Bool[Array, "B"], h: Array, denoising: Denoising) -> Bool[Array, "B"]:
        return plan


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Routed(Typed):
    """Skips a layer for a row when more than `threshold` of its masked tokens vote so.

    A row without masked tokens executes everything. Padding never votes.
    Source: DIALS, algorithm 1. `router` has the parameters of all layers, stacked or unrolled.
    """

    router: PyTree
    threshold: float = _static(default=0.1)

    def __post_init__(self):
        super().__post_init__()
        require(0 <= self.threshold <= 1, f"threshold={self.threshold} must lie in [0, 1]")
        require(
            not isinstance(self.router, str | Path),
            f"router={str(self.router)!r} is a path; give what load_router(path, model) returns",
        )

    def plan(self, num_layers: int, denoising: Denoising) -> PyTree:
        check_router(self.router, num_layers)
        return self.router

    def gate(
        self, plan: PyTree, h: Float[Array, "B T D"], denoising: Denoising
    ) -> Bool[Array, "B"]:
        start = denoising.vote_from
        votes = votes_to_skip(plan, h[:, start:])
        return skip_share(votes, denoising.masked[:, start:]) <= self.threshold


class StochasticPlan(NamedTuple):
    router: trees.Params
    layer: Int[Array, "..."]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StochasticRouted:
    """`Routed` for training: Gumbel votes, and float gates with straight-through gradients."""

    router: PyTree
    threshold: float = _static()
    temperature: float = _static()

    def plan(self, num_layers: int, denoising: Denoising) -> StochasticPlan:
        check_router(self.router, num_layers)
        return StochasticPlan(self.router, np.arange(num_layers))

    def gate(
        self, plan: StochasticPlan, h: Float[Array, "B T D"], denoising: Denoising
    ) -> Float[Array, "B"]:
        def noise(key):
            return jax.random.gumbel(jax.random.fold_in(key, plan.layer), (h.shape[1], 2))

        gumbel = jax.vmap(noise)(denoising.row_keys)
        votes = gumbel_votes(gumbel, apply_router(plan.router, h), self.temperature)
        share = skip_share(votes[..., SKIP], denoising.masked)
        return 1.0 - straight_through_threshold(share, self.threshold)


def check_router(router: PyTree, num_layers: int) -> None:
    leaves = jax.tree.leaves(router)
    arrays = bool(leaves) and all(np.ndim(leaf) > 0 and hasattr(leaf, "dtype") for leaf in leaves)
    require(arrays, "the router holds no arrays of parameters; give what load_router returns")
    layers = trees.num_layers(router)
    require(
        layers == num_layers,
        f"the router has {layers} layers and the model {num_layers}; train one for this model",
    )


def draws(policy: object) -> bool:
    """Whether the gates may depend on random keys: not those of full, static and routed passes."""
    return not (policy is None or isinstance(policy, Static | Routed))


def router_width(policy: object) -> int:
    """Hidden width of a policy's routers, for counting FLOPs; 0 for policies without."""
    if not isinstance(policy, Routed):
        return 0
    return trees.layer_slice(policy.router, 0)["down"].shape[-1]
