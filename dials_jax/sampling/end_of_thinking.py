"""Makes the end of a model's thinking more probable as its answer grows.

Source: `apply_end_think_logit_boost` of `generate.py` (ML-GSAI/LLaDA, for iLLaDA).
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def boost_end_of_thinking(
    logits: Float[Array, "B W V"],
    index: Int[Array, "B W"],
    answer: Int[Array, "B G"],
    candidates: Bool[Array, "B G"],
    ids: tuple[int, ...],
    boost: float,
    power: float,
) -> Float[Array, "B W V"]:
    """Logits in which the next token of the sequence `ids` gains, at the leftmost candidate.

    At position i of G it gains `boost * ((i + 1) / G) ** power`, until the answer has all of `ids`.

    Args:
      index: positions in the answer whose logits these are.
      candidates: masked positions of the block.
      ids: the tokens that end the thinking, as those of `</think>`.
    """
    first = jnp.argmax(candidates, axis=1)
    open_ = jnp.any(candidates, axis=1) & ~contains(answer, ids)
    gain = boost * ((first + 1) / answer.shape[1]) ** power
    at = (index == first[:, None]) & open_[:, None]
    added = jnp.where(at, gain[:, None], 0.0)
    token = jnp.broadcast_to(next_of(answer, first, ids)[:, None], index.shape)
    rows, columns = jnp.indices(index.shape, sparse=True)
    return logits.at[rows, columns, token].add(added)


def contains(answer: Int[Array, "B G"], ids: tuple[int, ...]) -> Bool[Array, "B"]:
    """Whether the tokens `ids` stand anywhere in an answer, one after the other."""
    starts = max(answer.shape[1] - len(ids) + 1, 0)
    here = jnp.ones((answer.shape[0], starts), bool)
    for i, token in enumerate(ids):
        here &= answer[:, i : i + starts] == token
    return jnp.any(here, axis=1)


def next_of(
    answer: Int[Array, "B G"], position: Int[Array, "B"], ids: tuple[int, ...]
) -> Int[Array, "B"]:
    """The token of `ids` that continues the longest beginning of it just before a position."""
    found = jnp.full(position.shape, ids[0])
    for length in range(1, len(ids)):  # the longest is the last to be written
        at = position[:, None] - length + jnp.arange(length)
        before = jnp.take_along_axis(answer, jnp.maximum(at, 0), axis=1)
        fits = jnp.all(before == jnp.array(ids[:length]), axis=1) & (position >= length)
        found = jnp.where(fits, ids[length], found)
    return found
