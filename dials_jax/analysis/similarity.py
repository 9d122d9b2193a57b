"""How much each layer changes the representation of a prompt (Goel et al. 2026)."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dials_jax import sharding
from dials_jax.data.items import pad_prompts
from dials_jax.models import transformer
from dials_jax.models.model import Model
from dials_jax.skipping.similarity import mean_cosine
from dials_jax.timing import Timed


def layer_similarities(
    model: Model,
    prompts: Sequence[Sequence[int]],
    gen_length: int,
    batch_size: int = 32,
) -> Float[np.ndarray, "L"]:
    """Mean cosine between the input and the output of each layer, over prompt positions.

    The canvas is that of the first denoising step: the prompt, then `gen_length` masks. Cosines
    are averaged over the positions of a prompt, then over prompts.
    """
    cfg, length = model.config, max(map(len, prompts))
    total = np.zeros(cfg.num_layers)
    for first in range(0, len(prompts), batch_size):
        chunk = prompts[first : first + batch_size]
        tokens, valid = pad_prompts(chunk, length, cfg.pad_id)
        rows = model.place_rows((jnp.asarray(tokens), jnp.asarray(valid)), batch_size)
        cosines, _ = model.run(_similarities, *rows, gen_length=gen_length)
        total += sharding.to_host(cosines)[:, : len(chunk)].sum(axis=1)
    return total / len(prompts)


def _similarities_fn(params, prompts, valid, *, cfg, gen_length) -> Float[Array, "L B"]:
    answer = jnp.full((prompts.shape[0], gen_length), cfg.mask_id, prompts.dtype)
    tokens = jnp.concatenate([prompts, answer], axis=1)
    in_prompt = jnp.concatenate([valid, jnp.zeros_like(answer, bool)], axis=1)
    present = jnp.concatenate([valid, jnp.ones_like(answer, bool)], axis=1)

    def cosine(before, after):
        return mean_cosine(before, after, in_prompt)

    return transformer.run_layers(cfg, params, tokens, present, observe=cosine).observed


_similarities = Timed(_similarities_fn, static_argnames=("cfg", "gen_length"))
