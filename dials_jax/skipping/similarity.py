"""Static layers by the similarity of what enters and leaves them (Goel, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from dials_jax import sharding
from dials_jax.compiling import timed_jit
from dials_jax.errors import require
from dials_jax.models import transformer
from dials_jax.models.model import Model
from dials_jax.models.padding import pad_prompts


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
    """Goel, Algorithm 1: chooses the most redundant layers, no two of them adjacent.

    Args:
      similarities: one number per layer: the cosine of its input and its output, in the residual
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


def layer_similarities(
    model: Model,
    prompts: Sequence[Sequence[int]],
    gen_length: int,
    batch_size: int = 32,
) -> Float[np.ndarray, "L"]:
    """Measures the mean cosine between each layer's input and output, for Goel, Algorithm 1.

    The canvas is that of the first denoising step: the prompt, then `gen_length` masks. Cosines
    are averaged over the positions of each prompt, then over prompts.
    """
    cfg, length = model.config, max(map(len, prompts))
    total = np.zeros(cfg.num_layers)
    for first in range(0, len(prompts), batch_size):
        chunk = prompts[first : first + batch_size]
        tokens, valid = pad_prompts(chunk, length, cfg.pad_id)
        rows = model.place_sequences((jnp.asarray(tokens), jnp.asarray(valid)), batch_size)
        cosines, _ = model.run(similarities_program, *rows, gen_length=gen_length)
        total += sharding.to_host(cosines)[:, : len(chunk)].sum(axis=1)
    return total / len(prompts)


@timed_jit("cfg", "gen_length")
def similarities_program(params, prompts, valid, *, cfg, gen_length) -> Float[Array, "L B"]:
    blank = cfg.pad_id if cfg.mask_id is None else cfg.mask_id
    answer = jnp.full((prompts.shape[0], gen_length), blank, prompts.dtype)
    tokens = jnp.concatenate([prompts, answer], axis=1)
    in_prompt = jnp.concatenate([valid, jnp.zeros_like(answer, bool)], axis=1)
    present = jnp.concatenate([valid, jnp.ones_like(answer, bool)], axis=1)

    def cosine(before, after):
        return mean_cosine(before, after, in_prompt)

    return transformer.run_layers(cfg, params, tokens, present, observe=cosine).observed
