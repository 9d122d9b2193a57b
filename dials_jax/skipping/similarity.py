"""Static layers by the similarity of what enters and leaves them (Goel, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dials_jax import sharding
from dials_jax.compiling import timed_jit
from dials_jax.errors import require
from dials_jax.models import transformer
from dials_jax.models.model import Model, check_shapes, check_vocabulary
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
      allow_adjacent: neighbours may both be skipped (Goel, Tables 2 and 3).

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


def require_enough_layers(num_skipped: int, num_layers: int, allow_adjacent: bool = False) -> None:
    """Checks that so many layers can be skipped: some must be left, and neighbours may not go.

    The most that fit are every second one, the first included. `choose_static_layers` takes the
    most similar layers first, so it may end with fewer than fit; that is no error.

    Raises: InputError naming the number, the layers of the model and the most that fit.
    """
    require(0 < num_skipped < num_layers, f"cannot skip {num_skipped} of {num_layers} layers")
    most = (num_layers + 1) // 2
    require(
        allow_adjacent or num_skipped <= most,
        f"cannot skip {num_skipped} of {num_layers} layers without neighbours: at most {most} fit; "
        "ask for fewer, or allow neighbours",
    )


def choice_shares(
    similarities: Float[np.ndarray, "N L"],
    max_skipped: int,
    threshold: float | None = 0.95,
    allow_adjacent: bool = False,
) -> Float[np.ndarray, "L"]:
    """The share of prompts whose own choice holds each layer: Goel, Figure 8.

    Args:
      similarities: of each prompt, from `prompt_similarities`.
      max_skipped, threshold, allow_adjacent: of `choose_static_layers`.
    """
    counts = np.zeros(np.shape(similarities)[1])
    for own in similarities:
        counts[list(choose_static_layers(own, max_skipped, threshold, allow_adjacent))] += 1
    return counts / len(similarities)


def layer_similarities(
    model: Model,
    prompts: Sequence[Sequence[int]] | Int[np.ndarray, "N P"],
    gen_length: int | None = None,
    batch_size: int = 32,
) -> Float[np.ndarray, "L"]:
    """The mean over prompts of `prompt_similarities`: one choice for all of them."""
    return prompt_similarities(model, prompts, gen_length, batch_size).mean(axis=0)


def prompt_similarities(
    model: Model,
    prompts: Sequence[Sequence[int]] | Int[np.ndarray, "N P"],
    gen_length: int | None = None,
    batch_size: int = 32,
) -> Float[np.ndarray, "N L"]:
    """Measures the cosine between each layer's input and output, for Goel, Algorithm 1.

    Cosines are averaged over the positions of each prompt. A masked diffusion model sees the canvas
    of the first denoising step: the prompt, then masks. A causal model sees the prompt alone: what
    follows changes none of its states there.

    Args:
      gen_length: masks after the prompt; a causal model needs none.

    Raises: InputError for a masked diffusion model without `gen_length`, for no prompts, an empty
      prompt, unknown tokens, and more tokens than the model has positions.
    """
    cfg = model.config
    require(batch_size > 0, f"batch_size={batch_size} must be positive")
    require(len(prompts) > 0, "there are no prompts to compare layers on; give at least one")
    for i, prompt in enumerate(prompts):
        require(len(prompt) > 0, f"prompt {i} is empty, so it has no similarities; leave it out")
    require(
        cfg.causal or (gen_length is not None and gen_length >= 0),
        f"gen_length={gen_length}: a masked diffusion model needs this many masks after a prompt; "
        "give what it generates",
    )
    masks, length = 0 if cfg.causal else gen_length, max(map(len, prompts))
    check_shapes(cfg, (len(prompts), length + masks), None, "prompts with masks")
    tokens, valid = pad_prompts(list(prompts), length, cfg.pad_id)
    check_vocabulary(cfg, tokens, valid, "prompt")
    found = []
    for first in range(0, len(prompts), batch_size):
        batch = slice(first, first + batch_size)
        placed = model.place_sequences((tokens[batch], valid[batch]), batch_size)
        cosines, _ = model.run(similarities_program, *placed, gen_length=masks)
        found.append(sharding.to_host(cosines).T)
    return np.concatenate(found)[: len(prompts)].astype(np.float64)


@timed_jit("cfg", "gen_length")
def similarities_program(params, prompts, valid, *, cfg, gen_length) -> Float[Array, "L B"]:
    masks = [(0, 0), (0, gen_length)]
    tokens = jnp.pad(prompts, masks, constant_values=cfg.mask_id if gen_length else 0)
    in_prompt, present = (jnp.pad(valid, masks, constant_values=x) for x in (False, True))

    def cosine(before, after):
        return mean_cosine(before, after, in_prompt)

    return transformer.run_layers(cfg, params, tokens, present, observe=cosine).observed
