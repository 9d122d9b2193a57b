"""LLaDA's sampler: blocks from left to right, the most confident tokens of a block first.

Source: `generate.py` of ML-GSAI/LLaDA, whose behaviour this follows token for token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dials_jax.config import ModelConfig, require


@dataclass(frozen=True)
class Confidence:
    """Settings of the sampler.

    As in the reference, a model that predicts [MASK] itself spends quota on it, and the token may
    stay in the result.

    Attributes:
      gen_length: tokens to generate; a multiple of `block_length`.
      steps: denoising steps in all; a multiple of the number of blocks.
      temperature: of the Gumbel noise; 0 is greedy.
      cfg_scale: classifier-free guidance w: logits = u + (w + 1)(c - u), where u sees no prompt.
      remasking: keep the most confident tokens, or random ones.
      logits_eos_inf: never generate end of text.
      confidence_eos_eot_inf: commit end of text and end of turn last. At a temperature above 0
        the reference suppresses only end of turn, and so does this.
    """

    gen_length: int
    block_length: int
    steps: int
    temperature: float = 0.0
    cfg_scale: float = 0.0
    remasking: Literal["low_confidence", "random"] = "low_confidence"
    logits_eos_inf: bool = False
    confidence_eos_eot_inf: bool = False

    def __post_init__(self):
        for name in ("gen_length", "block_length", "steps"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive")
        require(
            self.gen_length % self.block_length == 0,
            f"gen_length={self.gen_length} must be divisible by block_length={self.block_length}",
        )
        require(
            self.steps % self.num_blocks == 0,
            f"steps={self.steps} must be divisible by the {self.num_blocks} blocks "
            "(gen_length / block_length)",
        )
        for name in ("temperature", "cfg_scale"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative")
        require(
            self.remasking in ("low_confidence", "random"),
            f"remasking={self.remasking!r} must be 'low_confidence' or 'random'",
        )

    @property
    def num_blocks(self) -> int:
        return self.gen_length // self.block_length

    @property
    def steps_per_block(self) -> int:
        return self.steps // self.num_blocks


class Step(NamedTuple):
    """What one denoising step reports beside the tokens."""

    gates: Bool[Array, "L R"]
    masked_share: Float[Array, "R"]  # masked share of the generated part before the step


# predict(tokens, start, step) -> logits of the block that starts there, and gates
Predict = Callable[[Array, Array, Array], tuple[Array, Array]]


def denoise(
    sampler: Confidence,
    cfg: ModelConfig,
    predict: Predict,
    canvas: Int[Array, "B T"],
    noise_keys: jax.Array,
) -> tuple[Int[Array, "B T"], Step]:
    """Fills the canvas: one scan over all steps of all blocks."""
    prompt_length = canvas.shape[1] - sampler.gen_length

    def step(carry, i):
        tokens, block_masks = carry
        block, step_in_block = jnp.divmod(i, sampler.steps_per_block)
        start = prompt_length + block * sampler.block_length
        window = lax.dynamic_slice_in_dim(tokens, start, sampler.block_length, axis=1)
        masked = window == cfg.mask_id
        # Quotas count the masks that the row has when it enters the block.
        block_masks = jnp.where(step_in_block == 0, jnp.sum(masked, axis=1), block_masks)
        logits, gates = predict(tokens, start, i)
        keys = jax.vmap(jax.random.fold_in, (0, None))(noise_keys, i)
        guess, confidence = propose(sampler, cfg, logits, keys)
        quota = step_quota(block_masks, step_in_block, sampler.steps_per_block)
        commit = top_ranked(jnp.where(masked, confidence, -jnp.inf), quota) & masked
        share = jnp.mean(tokens[:, prompt_length:] == cfg.mask_id, axis=1)
        window = jnp.where(commit, guess, window)
        tokens = lax.dynamic_update_slice_in_dim(tokens, window, start, axis=1)
        return (tokens, block_masks), Step(gates, share)

    block_masks = jnp.zeros(canvas.shape[0], jnp.int32)
    (tokens, _), steps = lax.scan(step, (canvas, block_masks), jnp.arange(sampler.steps))
    return tokens, steps


def propose(
    sampler: Confidence,
    cfg: ModelConfig,
    logits: Float[Array, "B W V"],
    keys: jax.Array,
) -> tuple[Int[Array, "B W"], Float[Array, "B W"]]:
    """A token for every position, and how sure the model is of it."""
    if sampler.logits_eos_inf:
        logits = logits.at[..., cfg.eos_id].set(-jnp.inf)
    noisy = logits
    if sampler.temperature > 0:
        # argmax(logits + T * Gumbel) is the reference's argmax of exp(logits) / (-ln u)^T.
        noisy = logits + sampler.temperature * _per_row(_gumbel, keys, logits)
    guess = jnp.argmax(noisy, axis=-1)
    if sampler.remasking == "random":
        draw = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 1), guess.shape[1:]))
        return guess, draw(keys)
    if sampler.confidence_eos_eot_inf:
        # In the reference the noisy logits are the logits themselves at temperature 0, so there
        # both tokens are suppressed; above 0 only end of turn is.
        if cfg.eot_id is not None:
            logits = logits.at[..., cfg.eot_id].set(-jnp.inf)
        if sampler.temperature == 0:
            logits = logits.at[..., cfg.eos_id].set(-jnp.inf)
    chosen = jnp.take_along_axis(logits, guess[..., None], axis=-1)[..., 0]
    return guess, jnp.exp(chosen - jax.nn.logsumexp(logits, axis=-1))


def _gumbel(key: jax.Array, logits: Float[Array, "W V"]) -> Float[Array, "W V"]:
    # The default mode truncates the upper tail, which biases large vocabularies.
    return jax.random.gumbel(key, logits.shape, mode="high")


def _per_row(fn: Callable, keys: jax.Array, rows: Array) -> Array:
    return jax.vmap(fn)(keys, rows)


def step_quota(present: Int[Array, "B"], step: Int[Array, ""], num_steps: int) -> Int[Array, "B"]:
    """Tokens to commit at a step: m masks over s steps, the remainder on the first m mod s."""
    return present // num_steps + (step < present % num_steps)


def top_ranked(confidence: Float[Array, "B W"], quota: Int[Array, "B"]) -> Bool[Array, "B W"]:
    """The `quota` most confident positions of each row; ties go to the left."""
    order = jnp.argsort(-confidence, axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1, stable=True)
    return rank < quota[:, None]
