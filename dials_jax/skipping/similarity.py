"""Static layers by representation similarity: Algorithm 1 of Goel et al. 2026."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from dials_jax.config import require


def mean_cosine(
    before: Float[Array, "B T D"], after: Float[Array, "B T D"], where: Bool[Array, "B T"]
) -> Float[Array, "B"]:
    """Mean over the chosen positions of the cosine between two hidden states, in float32."""
    a, b = before.astype(jnp.float32), after.astype(jnp.float32)
    norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    cosine = jnp.sum(a * b, axis=-1) / jnp.maximum(norms, 1e-12)
    return jnp.sum(cosine * where, axis=-1) / jnp.maximum(jnp.sum(where, axis=-1), 1)


def choose_static_layers(
    similarities: Sequence[float] | Float[np.ndarray, "L"],
    max_skipped: int,
    threshold: float | None = 0.95,
    allow_adjacent: bool = False,
) -> tuple[int, ...]:
    """The layers to skip: the most redundant ones, no two of them adjacent.

    Args:
      similarities: one number a layer: the cosine of its input and its output, in the residual
        stream before the final norm. The paper's pair l is (H_l, H_l+1) with H_0 the embedding,
        and it skips layer l + 1 counted from 1: the layer between the two, layer l from 0.
      max_skipped: n_max of the paper.
      threshold: tau of the paper. None accepts any similarity.

    Returns: sorted layers, counted from 0. Fewer than `max_skipped` when similarities or adjacency
    leave no more.
    """
    require(max_skipped >= 0, f"max_skipped={max_skipped} must not be negative")
    chosen: list[int] = []
    for layer in np.argsort(-np.asarray(similarities), kind="stable"):
        if len(chosen) == max_skipped:
            break
        apart = allow_adjacent or not any(abs(int(layer) - c) <= 1 for c in chosen)
        similar = threshold is None or similarities[layer] >= threshold
        if apart and similar:
            chosen.append(int(layer))
    return tuple(sorted(chosen))
