"""What hidden states look like while a model fills a canvas, summed up as it does (Goel, Figures 3
to 7 and 9 to 14).

The hidden states are H_0, the embedding, to H_L, what leaves the last layer. A model call is
measured in the pass over each layer's input and output: products of neighbours, in float32. Of a
call only numbers per position are kept, and they are merged into the sums of all calls before the
next one. Nothing returns to the host, and no hidden state is kept but those of `change_layers`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dials_jax.config import ModelConfig, Typed, require_positive
from dials_jax.errors import require
from dials_jax.sharding import constrain_batch
from dials_jax.skipping.streaming import (
    BINS,
    Sums,
    binned_sums,
    grouped_sums,
    histogram,
    masked_mean,
)

FARTHEST = 32  # distances beyond this are counted with it


@dataclass(frozen=True)
class Observer(Typed):
    """What to measure. Settings only, so that it is static in compiled programs.

    Attributes:
      num_step_bins: groups of denoising steps at most, equal up to one step. Each is averaged.
      change_layers: layers after which a position's state is compared with that of the call before.
        The states of one call are kept for it: of the answers, per layer.
      sink_factor: a sink is a position whose norm exceeds the median of its layer this many times.
    """

    num_step_bins: int = 64
    change_layers: tuple[int, ...] = ()
    sink_factor: float = 5.0

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "num_step_bins", "sink_factor")
        require(
            list(self.change_layers) == sorted(set(self.change_layers)),
            f"change_layers={self.change_layers} must be different and ascending",
        )

    def check(self, num_layers: int) -> None:
        """Raises: InputError for a layer that the model does not have."""
        for layer in self.change_layers:
            require(
                0 <= layer < num_layers,
                f"change_layers: the model has no layer {layer}; its layers are 0 to "
                f"{num_layers - 1}",
            )

    def spans(self, num_layers: int) -> Iterator[tuple[int, int]]:
        """The layers in parts, each of which ends after one of `change_layers` or the last."""
        ends = {layer + 1 for layer in self.change_layers} | {num_layers}
        return pairwise((0, *sorted(ends)))


# -------------------------------------------------------------------------------- one model call


class Products(NamedTuple):
    """Sums over the width, in float32."""

    square: Float[Array, "*n B T"]  # of a state with itself
    along: Float[Array, "*n B pairs"]  # with that of the next position
    across: Float[Array, "*n B T"] | None  # with what the layer makes of it


def state_products(h: Float[Array, "B T D"], new: Float[Array, "B T D"] | None = None) -> Products:
    """The products of a layer's input. Args: new: its output; None after the last layer."""
    x = h.astype(jnp.float32)
    across = None if new is None else jnp.sum(x * new.astype(jnp.float32), axis=-1)
    return Products(jnp.sum(x * x, axis=-1), jnp.sum(x[:, :-1] * x[:, 1:], axis=-1), across)


class Seen(NamedTuple):
    """What one model call looked like.

    Attributes:
      tokens: that the model saw.
      states: after each of `change_layers`, in the answer.
    """

    tokens: Int[Array, "B T"]
    norm: Float[Array, "B states T"]
    layer_cosine: Float[Array, "B L T"]
    token_cosine: Float[Array, "B states pairs"]
    states: tuple[Float[Array, "B G D"], ...]


def seen_in(
    tokens: Int[Array, "B T"],
    parts: list[Products],
    last: Float[Array, "B T D"],
    states: tuple[Float[Array, "B G D"], ...],
) -> Seen:
    """The cosines of a call.

    Args:
      parts: of the layers, in order, stacked.
      last: what leaves the last layer.
    """
    end = state_products(last)

    def joined(name: str, *more: Array) -> Array:
        stacked = jnp.concatenate([getattr(part, name) for part in parts] + [x[None] for x in more])
        return jnp.moveaxis(stacked, 0, 1)

    norm = jnp.sqrt(joined("square", end.square))
    return Seen(
        tokens,
        norm,
        _cosine(joined("across"), norm[:, :-1], norm[:, 1:]),
        _cosine(joined("along", end.along), norm[..., :-1], norm[..., 1:]),
        states,
    )


def _cosine(product: Array, one: Array, two: Array) -> Array:
    return jnp.clip(product / jnp.maximum(one * two, 1e-12), -1, 1)


# ------------------------------------------------------------------------------------- all calls


class Previous(NamedTuple):
    """Each sequence's own last call: what the model saw, and its states after `change_layers`."""

    tokens: Int[Array, "B T"]
    states: tuple[Float[Array, "B G D"], ...]


class Observed(NamedTuple):
    """What all calls so far looked like: see `studies.profile.Profile`, which has these numbers.

    Attributes:
      calls: of each sequence's own.
      previous: None without `change_layers`.
    """

    layer_cosine: Sums  # [S, L, T]
    token_cosine: Sums  # [S, states, T-1]
    norm: Sums  # [S, states, T]
    largest_norm: Float[Array, "states T"]
    sinks: Int[Array, "states T"]
    layer_histogram: Int[Array, "L bins"]
    token_histogram: Int[Array, "states bins"]
    calls: Int[Array, "B"]
    sequence_layer: Float[Array, "B L"]
    sequence_token: Float[Array, "B states"]
    end_token: Float[Array, "B states"]
    prompt_layer: Float[Array, "B L"]
    change: Sums  # [K, D]
    previous: Previous | None


def of_sequences(observed: Observed | None, num_sequences: int) -> Observed | None:
    """Leaves out the sequences that only pad the batch; the sums never counted them."""
    if observed is None:
        return None
    names = ("calls", "sequence_layer", "sequence_token", "end_token", "prompt_layer")
    return observed._replace(**{name: getattr(observed, name)[:num_sequences] for name in names})


@dataclass(frozen=True)
class BatchObserver:
    """An observer at work on one batch of canvases.

    Attributes:
      num_steps: denoising steps that are grouped.
      prompt_length: where the answers start.
      present: False at positions that do not count: padding, and sequences that only pad a batch.
    """

    settings: Observer
    num_steps: int
    prompt_length: int
    present: Bool[Array, "B T"]

    @property
    def num_bins(self) -> int:
        return min(self.settings.num_step_bins, self.num_steps)

    def start(self, cfg: ModelConfig, tokens: Int[Array, "B T"]) -> Observed:
        """Nothing seen yet."""
        (batch, length), layers, states = tokens.shape, cfg.num_layers, cfg.num_layers + 1
        answer, looked_at = length - self.prompt_length, self.settings.change_layers

        def zeros(*shape: int, dtype=jnp.float32) -> Array:
            return jnp.zeros(shape, dtype)

        def of_batch(*shape: int, dtype=jnp.float32) -> Array:
            return constrain_batch(zeros(batch, *shape, dtype=dtype))

        def sums(groups: int, *shape: int) -> Sums:
            return Sums(zeros(groups, 1, shape[-1]), *(zeros(groups, *shape) for _ in range(2)))

        kept = tuple(of_batch(answer, cfg.d_model, dtype=cfg.dtype) for _ in looked_at)
        distances = 2 * FARTHEST + 1
        return Observed(
            layer_cosine=sums(self.num_bins, layers, length),
            token_cosine=sums(self.num_bins, states, length - 1),
            norm=sums(self.num_bins, states, length),
            largest_norm=zeros(states, length),
            sinks=zeros(states, length, dtype=jnp.int32),
            layer_histogram=zeros(layers, BINS, dtype=jnp.int32),
            token_histogram=zeros(states, BINS, dtype=jnp.int32),
            calls=of_batch(dtype=jnp.int32),
            sequence_layer=of_batch(layers),
            sequence_token=of_batch(states),
            end_token=of_batch(states),
            prompt_layer=of_batch(layers),
            change=Sums(zeros(1, distances), *(zeros(len(kept), distances) for _ in range(2))),
            previous=Previous(tokens, kept) if kept else None,
        )

    def fold(
        self,
        so_far: Observed,
        seen: Seen,
        written: Bool[Array, "B T"],
        step: Int[Array, "..."],
        own: Bool[Array, "B"],
    ) -> Observed:
        """The sums with one more call.

        Args:
          written: False at a [MASK].
          step: the denoising step, the same in all sequences or one for each.
          own: False where the call was made for other sequences.
        """
        own &= jnp.any(self.present, axis=1)
        here = self.present & own[:, None]
        pairs, calls = here[:, :-1] & here[:, 1:], so_far.calls + own
        answer, prompt = slice(self.prompt_length, None), slice(0, self.prompt_length)
        group = self.group_of(jnp.broadcast_to(step, own.shape))
        weight = own / jnp.maximum(calls, 1)

        def in_answer(values: Array, where: Array) -> Array:
            some = jnp.any(where[:, answer], axis=1)[:, None]
            return jnp.where(some, masked_mean(values[..., answer], where[:, answer]), jnp.nan)

        def running(mean: Array, values: Array, where: Array) -> Array:
            new = mean + weight[:, None] * (in_answer(values, where) - mean)
            return jnp.where(own[:, None], new, mean)

        differ = seen.tokens[:, :-1] != seen.tokens[:, 1:]
        end = in_answer(seen.token_cosine, pairs & written[:, :-1] & written[:, 1:] & differ)
        in_prompt = masked_mean(seen.layer_cosine[..., prompt], here[:, prompt])
        first = (own & (so_far.calls == 0))[:, None]
        change, previous = self.fold_change(so_far, seen, own)
        largest = jnp.max(jnp.where(here[:, None], seen.norm, 0.0), axis=0)
        return Observed(
            so_far.layer_cosine.merge(grouped_sums(seen.layer_cosine, here, group)),
            so_far.token_cosine.merge(grouped_sums(seen.token_cosine, pairs, group)),
            so_far.norm.merge(grouped_sums(seen.norm, here, group)),
            jnp.maximum(so_far.largest_norm, largest),
            so_far.sinks + count_sinks(seen.norm, here, self.settings.sink_factor),
            so_far.layer_histogram + histogram(seen.layer_cosine, here),
            so_far.token_histogram + histogram(seen.token_cosine, pairs),
            calls,
            running(so_far.sequence_layer, seen.layer_cosine, here),
            running(so_far.sequence_token, seen.token_cosine, pairs),
            jnp.where(own[:, None], end, so_far.end_token),  # a later call replaces it
            jnp.where(first, in_prompt, so_far.prompt_layer),
            change,
            previous,
        )

    def group_of(self, step: Int[Array, "B"]) -> Float[Array, "B S"]:
        """1 at the group of each sequence's step. A call after the last step is of the last."""
        group = jnp.minimum(step * self.num_bins // self.num_steps, self.num_bins - 1)
        return jax.nn.one_hot(group, self.num_bins)

    def fold_change(
        self, so_far: Observed, seen: Seen, own: Bool[Array, "B"]
    ) -> tuple[Sums, Previous | None]:
        """Adds how far states moved since each sequence's last call, by distance to new tokens."""
        previous = so_far.previous
        if previous is None:
            return so_far.change, None
        moved = (seen.tokens != previous.tokens)[:, self.prompt_length :]
        counted = own & (so_far.calls > 0) & jnp.any(moved, axis=1)
        at = jnp.clip(signed_distance(moved), -FARTHEST, FARTHEST) + FARTHEST
        bins = jax.nn.one_hot(at, 2 * FARTHEST + 1) * counted[:, None, None]
        change = jnp.stack(
            [1 - state_cosine(*both) for both in zip(previous.states, seen.states, strict=True)]
        )
        sums = so_far.change.merge(binned_sums(change, bins))
        tokens = jnp.where(own[:, None], seen.tokens, previous.tokens)
        states = tuple(
            jnp.where(own[:, None, None], new, old)
            for old, new in zip(previous.states, seen.states, strict=True)
        )
        return sums, Previous(tokens, states)


def count_sinks(
    norm: Float[Array, "B states T"], where: Bool[Array, "B T"], factor: float
) -> Int[Array, "states T"]:
    """In how many sequences a position's norm exceeds `factor` times its layer's median."""
    median = jnp.nanmedian(jnp.where(where[:, None], norm, jnp.nan), axis=-1, keepdims=True)
    return jnp.sum((norm > factor * median) & where[:, None], axis=0, dtype=jnp.int32)


def signed_distance(moved: Bool[Array, "B G"]) -> Int[Array, "B G"]:
    """Each position minus the nearest one that moved; of two as near, the one to the left."""
    index, size = jnp.arange(moved.shape[1]), moved.shape[1]
    left = index - lax.cummax(jnp.where(moved, index, -size), axis=1)
    right = lax.cummin(jnp.where(moved, index, 2 * size), axis=1, reverse=True) - index
    return jnp.where(left <= right, left, -right)


def state_cosine(one: Float[Array, "B G D"], two: Float[Array, "B G D"]) -> Float[Array, "B G"]:
    a, b = one.astype(jnp.float32), two.astype(jnp.float32)
    norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    return _cosine(jnp.sum(a * b, axis=-1), norms, jnp.ones_like(norms))
