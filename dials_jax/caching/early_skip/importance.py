"""How much a token matters to the next step (ES-dLLM, its importance score)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def change(
    new: Float[Array, "R W *D"], old: Float[Array, "R W *D"], active: Bool[Array, "R W"] | None
) -> Float[Array, "R W"]:
    """Mean absolute change, in units of the old value's root mean square.

    Divided by a row's largest where that exceeds 1, which it does before the cache knows anything.
    """
    new, old = (x.reshape(*x.shape[:2], -1).astype(jnp.float32) for x in (new, old))
    scale = jnp.sqrt(jnp.mean(old * old, axis=-1)) + 1e-6
    delta = jnp.mean(jnp.abs(new - old), axis=-1) / scale
    counted = delta if active is None else jnp.where(active, delta, 0.0)
    return delta / jnp.maximum(jnp.max(counted, axis=-1, keepdims=True), 1.0)


def importance(
    confidence: Float[Array, "R W"],
    delta: Float[Array, "R W"],
    alpha: float,
    active: Bool[Array, "R W"] | None,
) -> Float[Array, "R W"]:
    """alpha * confidence + (1 - alpha) * change, and 2 more for the two most confident tokens."""
    score = alpha * confidence + (1 - alpha) * delta
    if alpha == 0:
        return score
    counted = confidence if active is None else jnp.where(active, confidence, -jnp.inf)
    two = top(counted, min(2, confidence.shape[1]))
    return score + 2.0 * jnp.any(jnp.arange(score.shape[1]) == two[..., None], axis=1)


def top(score: Float[Array, "R W"], count: int) -> Int[Array, "R {count}"]:
    """The places of the `count` highest scores of each row, the highest first.

    Ties go to the left. In the published code they go wherever `torch.topk` leaves them, and that
    matters: near a block's end the second most confident token is one of many with none.
    """
    return jax.lax.top_k(score, count)[1]
