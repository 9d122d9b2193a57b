"""How important a token is to the next step, and how many tokens are kept (ES-dLLM).

    importance = alpha * confidence + (1 - alpha) * change
                 + 2 for the two most confident tokens, if alpha > 0
                 + 5 for the leftmost masked token of the block
                 + 3 for the tokens that the last step revealed, if alpha < 1

The confidence is that of the token last proposed at a position, and 0 where none can be revealed.
The change is that of an indicator (a layer's output, or its queries, keys or values) since it was
last cached at that position. The most important tokens are kept for the next layers: `num_kept`
says how many, `keep_top_tokens` which.

Source: ES-dLLM, token importance. The constants are those of its published code.
"""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dials_jax.nn.kernels.row_sums import row_mean
from dials_jax.nn.kv import gather

MOST_CONFIDENT, LEFTMOST_MASKED, JUST_REVEALED = 2.0, 5.0, 3.0
NumTokens = TypeVar("NumTokens", np.int64, Array)


def importance(
    confidence: Float[Array, "R W"],
    change: Float[Array, "R W"],
    bonus: Float[Array, "R W"],
    alpha: float,
    active: Bool[Array, "R W"] | None,
) -> Float[Array, "R W"]:
    """A token's importance, `bonus` being that of `fixed_bonus`; -inf where not active."""
    score = alpha * confidence + (1 - alpha) * change
    if alpha > 0:
        counted = confidence if active is None else jnp.where(active, confidence, -jnp.inf)
        two = top(counted, min(2, confidence.shape[1]))
        most_confident = jnp.any(jnp.arange(score.shape[1]) == two[..., None], axis=1)
        score = score + MOST_CONFIDENT * most_confident
    score = score + bonus
    return score if active is None else jnp.where(active, score, -jnp.inf)


def fixed_bonus(
    masked: Bool[Array, "R W"], revealed: Bool[Array, "R W"], alpha: float
) -> Float[Array, "R W"]:
    """The terms that stay the same through the layers of a call.

    Args:
      masked: tokens that are masked, from left to right.
      revealed: tokens that the last step revealed; none of them is masked.
    """
    leftmost = (jnp.arange(masked.shape[1]) == jnp.argmax(masked, axis=1)[:, None]) & masked
    bonus = jnp.where(leftmost, LEFTMOST_MASKED, 0.0)
    return jnp.where(revealed, JUST_REVEALED, bonus) if alpha < 1 else bonus


def indicator_change(
    new: Float[Array, "R W *D"], old: Float[Array, "R W *D"], active: Bool[Array, "R W"] | None
) -> Float[Array, "R W"]:
    """Mean absolute change, in units of the old value's root mean square.

    Divided by the sequence's largest where that exceeds 1, as it does while the cache is empty.
    """
    new, old = (x.reshape(*x.shape[:2], -1).astype(jnp.float32) for x in (new, old))
    scale = jnp.sqrt(row_mean(old * old)) + 1e-6
    change = row_mean(jnp.abs(new - old)) / scale
    counted = change if active is None else jnp.where(active, change, 0.0)
    return change / jnp.maximum(jnp.max(counted, axis=-1, keepdims=True), 1.0)


def num_kept(proportion: float, block_length: int, num_revealed: NumTokens) -> NumTokens:
    """How many tokens of a block are kept, when the last step revealed `num_revealed`.

    Its share of the block, or two more tokens than were revealed, but no more than the block.
    """
    return (num_revealed + 2).clip(int(proportion * block_length), block_length)


def keep_top_tokens(
    score: Float[Array, "R W"],
    active: Bool[Array, "R W"] | None,
    size: int,
    count: Int[Array, "R 1"] | None = None,
) -> tuple[Int[Array, "R {size}"], Bool[Array, "R {size}"] | None]:
    """The tokens of highest importance per sequence, the highest first, and which are active.

    Args:
      size: tokens that stay in the window.
      count: how many of these stay active in each sequence; None: all that were.
    """
    chosen = top(score, size)
    kept = None if active is None else gather(active, chosen)
    if count is None:
        return chosen, kept
    first = jnp.arange(size) < count
    return chosen, first if kept is None else kept & first


def top(score: Float[Array, "R W"], count: int) -> Int[Array, "R {count}"]:
    """The indices of the `count` highest scores per sequence, the highest first.

    Ties go to the left. In the published code they go wherever `torch.topk` leaves them, and that
    matters: near a block's end the second most confident token is one of many with confidence 0.
    """
    return jax.lax.top_k(score, count)[1]
