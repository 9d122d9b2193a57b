"""Which layers run: the policies full (None), static, random and routed.

Each is a pytree, so it enters compiled functions as an argument, and implements
`dials_jax.nn.policy.Policy`. Layers count from 0. Sequences decide alone: the
gates of one come from its own tokens, hidden states and key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Number
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from dials_jax.config import INT32, Range, as_type
from dials_jax.errors import require
from dials_jax.nn.policy import Denoising


def static_field(**kwargs):
    return field(metadata={"static": True}, **kwargs)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Static:
    """Skips the same layers at every step (Goel et al. 2026)."""

    name = "static"
    uses_keys = False

    layers: Sequence[int] = static_field()  # stored as a sorted tuple, without duplicates

    def __post_init__(self):
        layers = list(self.layers) if isinstance(self.layers, set | frozenset) else self.layers
        layers = as_type(tuple[int, ...], layers, "layers")
        object.__setattr__(self, "layers", tuple(sorted(set(layers))))

    def check(self, num_layers: int) -> None:
        """Raises: InputError for a layer that a model with this many layers does not have."""
        for layer in self.layers:
            require(
                0 <= layer < num_layers,
                f"Static: layer {layer} does not exist; layers count from 0 to {num_layers - 1}",
            )

    def static_gates(self, num_layers: int) -> Bool[np.ndarray, "L"]:
        self.check(num_layers)
        return ~np.isin(np.arange(num_layers), self.layers)

    def prepare(self, num_layers: int, denoising: Denoising) -> Bool[np.ndarray, "L"]:
        return self.static_gates(num_layers)

    def gate(
        self, prepared: Bool[Array, ""], h: Float[Array, "B T D"], denoising: Denoising
    ) -> Bool[Array, ""]:
        return prepared


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StaticGates:
    """`Static` with its layers as an argument of compiled programs: one program serves all sets.

    Every layer then has a branch, as `Static` has with stacked layers; with unrolled layers the
    programs of `Static` are faster to run.
    """

    name = "static"
    uses_keys = False
    closed_for_good = True

    gates: Any  # [L], False where a layer is skipped; JAX also builds the class around tracers

    @classmethod
    def of(cls, layers: Sequence[int], num_layers: int) -> StaticGates:
        """Skips these layers, as `Static(layers)` does, of a model with `num_layers`.

        Raises: InputError for a layer that the model does not have.
        """
        return cls(Static(layers).static_gates(num_layers))

    def prepare(self, num_layers: int, denoising: Denoising) -> Bool[Array, "L"]:
        shape = np.shape(self.gates)
        require(
            shape == (num_layers,),
            f"StaticGates: gates has shape {shape}, and the model {num_layers} layers; give one "
            "gate per layer, as StaticGates.of(layers, num_layers) does",
        )
        return jnp.asarray(self.gates, bool)

    def gate(
        self, prepared: Bool[Array, ""], h: Float[Array, "B T D"], denoising: Denoising
    ) -> Bool[Array, ""]:
        return prepared


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Random:
    """Skips `num_skipped` random layers (at most all), drawn again for every sequence and step.

    The number is an argument of compiled programs: one program serves all numbers.
    """

    name = "random"

    num_skipped: Any  # an integer; JAX also builds the class around tracers and shapes

    def __post_init__(self):
        if isinstance(self.num_skipped, Number | str | bytes | list | tuple | dict | set):
            number = as_type(Annotated[int, Range(0, INT32.high)], self.num_skipped, "num_skipped")
            object.__setattr__(self, "num_skipped", number)

    def prepare(self, num_layers: int, denoising: Denoising) -> Bool[Array, "L B"]:
        require(self.num_skipped is not None, "Random: num_skipped is None; give how many layers")

        def one(key, step):
            order = jax.random.permutation(jax.random.fold_in(key, step), num_layers)
            return order >= self.num_skipped

        keys = denoising.sequence_keys
        return jax.vmap(one)(keys, jnp.broadcast_to(denoising.step, keys.shape)).T

    def gate(self, prepared: Bool[Array, "B"], h: Array, denoising: Denoising) -> Bool[Array, "B"]:
        return prepared
