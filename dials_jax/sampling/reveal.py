"""One step: the tokens that a forward call reveals.

logits --propose--> a token and a confidence for each position --choose--> the positions to
reveal --reveal--> the canvas with these tokens, and what the cache is told of them
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dials_jax.caching.cache import Blocks, ForwardInputs, ForwardOutputs, Revealed
from dials_jax.caching.canvas import CanvasModel
from dials_jax.config import ModelConfig
from dials_jax.diffusion.guidance import guide
from dials_jax.models import transformer
from dials_jax.sampling.end_of_text import too_early
from dials_jax.sampling.end_of_thinking import boost_end_of_thinking
from dials_jax.sampling.sampler import log_probability_of


class StepInfo(NamedTuple):
    """What a sampler may know of a step."""

    step_in_block: Int[Array, ""]  # -1: the call before the first step of a block-causal model
    present: Int[Array, "B"]  # masked tokens of the block at its first step
    remaining: Int[Array, "B"]  # masked tokens of the block now
    place: Int[Array, "B W"] | None = None  # of the tokens proposed, counted from the block's first


class StepSampler:
    """What a sampler says of one step. Keys are one per position, [B, W].

    Attributes:
      edits: a step may also replace tokens that are revealed already, as `revise` says.
      delay_eos, end_think_ids, end_think_boost, end_think_power: see `Confidence`.
    """

    edits = False
    cfg_scale = 0.0
    delay_eos = False
    end_think_ids: tuple[int, ...] = ()
    end_think_boost = 0.0
    end_think_power = 2.0

    def propose(
        self, cfg: ModelConfig, logits: Float[Array, "B W V"], keys: jax.Array
    ) -> tuple[Int[Array, "B W"], Float[Array, "B W"]]:
        """A token for every position, and how confident the model is in it."""
        raise NotImplementedError

    def choose(
        self, confidence: Float[Array, "B W"], info: StepInfo, keys: jax.Array
    ) -> Bool[Array, "B W"]:
        """The positions to reveal. The confidence is -inf where there is nothing to reveal."""
        raise NotImplementedError

    def revise(
        self,
        logits: Float[Array, "B W V"],
        guess: Int[Array, "B W"],
        tokens: Int[Array, "B W"],
    ) -> Bool[Array, "B W"]:
        """Where a revealed token is to be replaced by the one proposed now, if `edits`."""
        raise NotImplementedError


def reveal(
    sampler: StepSampler,
    net: CanvasModel,
    blocks: Blocks,
    out: ForwardOutputs,
    inputs: ForwardInputs,
    info: StepInfo,
    keys: jax.Array,
    *,
    with_log_probs: bool,
) -> tuple[Int[Array, "B T"], Revealed]:
    """The canvas after a forward call, and what the cache is told of it.

    Args:
      keys: [B, W], of the positions computed.
    """
    cfg, tokens = net.cfg, inputs.tokens
    window = jnp.take_along_axis(tokens, out.index, axis=1)
    masked = transformer.is_masked(cfg, window)
    if out.active is not None:
        masked &= out.active
    logits = transformer.head_logits(cfg, net.params, out.h)
    if net.prompt_mask is not None:
        logits = guide(logits, sampler.cfg_scale)
    of_model = logits
    if sampler.end_think_ids:
        logits = _boost_end_of_thinking(sampler, cfg, blocks, logits, out.index, inputs)
    logits = transformer.apply_subs(cfg, logits)
    guess, confidence = sampler.propose(cfg, logits, keys)
    shown = jnp.where(masked, confidence, 0.0)
    if sampler.delay_eos:
        delayed = (guess == cfg.eos_id) & too_early(cfg, blocks, inputs, out.index)
        confidence = jnp.where(delayed, 0.0, confidence)
        # The published code shows a delayed token's own confidence to a shifted model's cache.
        shown = shown if cfg.right_shift else jnp.where(masked, confidence, 0.0)
    commit = masked & sampler.choose(jnp.where(masked, confidence, -jnp.inf), info, keys)
    if sampler.edits:
        known = inputs.unfinished[:, None] & ~transformer.is_masked(cfg, window)
        known &= ~transformer.is_masked(cfg, guess)  # nothing is masked again
        commit |= known & sampler.revise(logits, guess, window)
    tokens = _put(tokens, out.index, jnp.where(commit, guess, window))
    log_probs = None
    if with_log_probs:
        log_probs = log_probability_of(guess, transformer.apply_subs(cfg, of_model))
    unfinished = inputs.unfinished
    return tokens, Revealed(out.index, out.active, shown, commit, unfinished, log_probs)


def _boost_end_of_thinking(
    sampler: StepSampler,
    cfg: ModelConfig,
    blocks: Blocks,
    logits: Float[Array, "B W V"],
    index: Int[Array, "B W"],
    inputs: ForwardInputs,
) -> Float[Array, "B W V"]:
    answer = inputs.tokens[:, blocks.start :]
    in_block = jnp.arange(answer.shape[1]) // blocks.length == inputs.block
    return boost_end_of_thinking(
        logits,
        index - blocks.start,
        answer,
        transformer.is_masked(cfg, answer) & in_block,
        sampler.end_think_ids,
        sampler.end_think_boost,
        sampler.end_think_power,
    )


def position_keys(
    noise_keys: jax.Array, step: Int[Array, "..."], position: Int[Array, "B W"]
) -> jax.Array:
    """One key per position of the answer: its noise is the same in any batch and any window.

    Args:
      step: the same in all sequences, or one for each.
    """
    steps = jnp.broadcast_to(step, noise_keys.shape)
    of_step = jax.vmap(jax.random.fold_in)(noise_keys, steps)
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(of_step, position)


def write_log_probs(
    known: Float[Array, "B T"] | None, revealed: Revealed
) -> Float[Array, "B T"] | None:
    """The canvas's log-probabilities with those of the tokens written now; None: not kept."""
    if known is None:
        return None
    before = jnp.take_along_axis(known, revealed.index, axis=1)
    return _put(known, revealed.index, jnp.where(revealed.commit, revealed.log_probs, before))


def _put(tokens: Array, index: Array, new: Array) -> Array:
    return jax.vmap(lambda tokens, at, x: tokens.at[at].set(x, unique_indices=True))(
        tokens, index, new
    )
