"""Where answers end: at an end of text, or at a stop token."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from dials_jax.caching.cache import Blocks, ForwardInputs
from dials_jax.config import ModelConfig
from dials_jax.models import transformer


def fill_after_eos(
    cfg: ModelConfig, tokens: Int[Array, "B T"], prompt_length: int
) -> Int[Array, "B T"]:
    """Fills what is still masked after an end of text with it, once no token before it is.

    Tokens that were revealed behind it before, in the same block, stay.
    """
    answer = tokens[:, prompt_length:]
    fill = from_eos_on(cfg, answer) & transformer.is_masked(cfg, answer)
    return tokens.at[:, prompt_length:].set(jnp.where(fill, cfg.eos_id, answer))


def from_eos_on(cfg: ModelConfig, answer: Int[Array, "B G"]) -> Bool[Array, "B G"]:
    """From an answer's first end of text on, if no token before that is masked."""
    known = jnp.cumsum(transformer.is_masked(cfg, answer), axis=1) == 0
    return jnp.cumsum((answer == cfg.eos_id) & known, axis=1) > 0


def after_stop(
    answer: Int[Array, "B G"], stop_ids: Sequence[int], filled: Int[Array, ""]
) -> Bool[Array, "B G"]:
    """What follows the first `filled` tokens of an answer, where those hold a stop token."""
    past = jnp.arange(answer.shape[1]) < filled
    stops = jnp.isin(answer, jnp.array(stop_ids)) & past
    return jnp.any(stops, axis=1, keepdims=True) & ~past


def too_early(
    cfg: ModelConfig, blocks: Blocks, inputs: ForwardInputs, index: Int[Array, "B W"]
) -> Bool[Array, "B W"]:
    """Where ES-dLLM delays an end of text.

    It does so while the sequence has none, unless the token before it is known or in an earlier
    block.
    """
    generated = inputs.tokens[:, blocks.start :]
    without = ~jnp.any(generated == cfg.eos_id, axis=1, keepdims=True)
    before = jnp.take_along_axis(inputs.tokens, jnp.maximum(index - 1, 0), axis=1)
    inside = index > blocks.start + inputs.block * blocks.length
    return without & transformer.is_masked(cfg, before) & inside
