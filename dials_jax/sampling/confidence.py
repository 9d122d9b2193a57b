"""LLaDA's sampler: blocks from left to right, the most confident tokens of a block first.

Source: `generate.py` of ML-GSAI/LLaDA, whose behaviour this follows token for token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dials_jax.config import ModelConfig, Typed, require_positive
from dials_jax.errors import require
from dials_jax.sampling.loop import BlockSampler, StepInfo


@dataclass(frozen=True)
class Confidence(Typed, BlockSampler):
    """Settings of the sampler.

    As in the reference, if the model predicts [MASK], that position uses up quota and [MASK] may
    remain in the output.

    Attributes:
      gen_length: tokens to generate; a multiple of `block_length`.
      block_length: tokens per block. None: one block.
      steps: denoising steps in all; a multiple of the number of blocks. None: one per token.
      temperature: of the Gumbel noise; 0 is greedy.
      cfg_scale: classifier-free guidance w: logits = u + (w + 1)(c - u), where u sees no prompt.
      remasking: keep the most confident tokens, or random ones.
      threshold: reveal every token of the block of at least this confidence, and always the most
        confident (Fast-dLLM). `steps` is then ignored.
      factor: reveal the n most confident tokens as long as the n-th is at least 1 - factor/(n + 1)
        (Fast-dLLM), and always the first. `steps` is then ignored.
      logits_eos_inf: never generate end of text.
      confidence_eos_eot_inf: commit end of text and end of turn last. At a temperature above 0
        the reference suppresses only end of turn, and so does this.
      delay_eos: no confidence in a sequence's first end of text while the token before it is masked
        (ES-dLLM).
      stop_at_eos: a sequence ends at an end of text once all before it is known; the rest is filled
        with end of text, and costs no more steps.
    """

    is_probability = True

    gen_length: int
    block_length: int | None = None
    steps: int | None = None
    temperature: float = 0.0
    cfg_scale: float = 0.0
    remasking: Literal["low_confidence", "random"] = "low_confidence"
    threshold: float | None = None
    factor: float | None = None
    logits_eos_inf: bool = False
    confidence_eos_eot_inf: bool = False
    delay_eos: bool = False
    stop_at_eos: bool = False

    def __post_init__(self):
        super().__post_init__()
        for name in ("block_length", "steps"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, self.gen_length)
        require_positive(self, "gen_length", "block_length", "steps")
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
            self.threshold is None or self.factor is None,
            "threshold and factor are two rules for the same choice; give one of them",
        )
        for name in ("threshold", "factor"):
            value = getattr(self, name)
            require(value is None or value >= 0, f"{name}={value} must not be negative")

    def with_length(self, gen_length: int) -> Confidence:
        follow = {
            name: gen_length if getattr(self, name) == self.gen_length else getattr(self, name)
            for name in ("block_length", "steps")
        }
        return replace(self, gen_length=gen_length, **follow)

    @property
    def num_blocks(self) -> int:
        return self.gen_length // self.block_length

    @property
    def steps_per_block(self) -> int:
        """At most: a step that reveals nothing need not be made."""
        if self.max_quota is None:
            return self.block_length
        return min(self.steps // self.num_blocks, self.block_length)

    @property
    def max_quota(self) -> int | None:
        """Tokens that a step reveals per sequence at most; None: any number."""
        if self.threshold is not None or self.factor is not None:
            return None
        return -(-self.block_length * self.num_blocks // self.steps)

    def propose(self, cfg: ModelConfig, logits: Array, keys: jax.Array) -> tuple[Array, Array]:
        return propose(self, cfg, logits, keys)

    def choose(
        self, confidence: Float[Array, "B W"], info: StepInfo, keys: jax.Array
    ) -> Bool[Array, "B W"]:
        if self.threshold is not None:
            return (confidence >= self.threshold) | (ranks(confidence) == 0)
        if self.factor is not None:
            return confident_run(confidence, self.factor)
        quota = step_quota(info.present, info.step_in_block, self.steps_per_block)
        return ranks(confidence) < quota[:, None]


def propose(
    sampler: Confidence,
    cfg: ModelConfig,
    logits: Float[Array, "B W V"],
    keys: jax.Array,
) -> tuple[Int[Array, "B W"], Float[Array, "B W"]]:
    """A token for every position, and the model's confidence in it."""
    if sampler.logits_eos_inf:
        logits = logits.at[..., cfg.eos_id].set(-jnp.inf)
    noisy = logits
    if sampler.temperature > 0:
        # argmax(logits + T * Gumbel) is the reference's argmax of exp(logits) / (-ln u)^T.
        noisy = logits + sampler.temperature * gumbel_like(logits, keys)
    guess = jnp.argmax(noisy, axis=-1)
    if sampler.remasking == "random":
        draw = jax.vmap(jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 1))))
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


def gumbel_like(logits: Float[Array, "B W V"], keys: jax.Array) -> Float[Array, "B W V"]:
    """Gumbel noise from one key per position.

    The default mode of JAX truncates the upper tail, which biases large vocabularies.
    """
    draw = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:], mode="high"))
    return jax.vmap(draw)(keys)


def step_quota(present: Int[Array, "B"], step: Int[Array, ""], num_steps: int) -> Int[Array, "B"]:
    """Tokens to commit at a step: m masks over s steps, the remainder on the first m mod s."""
    return present // num_steps + (step < present % num_steps)


def ranks(confidence: Float[Array, "B W"]) -> Int[Array, "B W"]:
    """Each position's rank in its sequence, 0 for the most confident; ties go to the left."""
    order = jnp.argsort(-confidence, axis=-1, stable=True)
    return jnp.argsort(order, axis=-1, stable=True)


def confident_run(confidence: Float[Array, "B W"], factor: float) -> Bool[Array, "B W"]:
    """The n most confident positions, for the first n whose successor is below its bound.

    The published code also accepts the very last position if that is the only one to fail.
    """
    rank = ranks(confidence)  # from 0, so that the n-th has rank n - 1
    enough = (confidence >= 1 - factor / (rank + 2)) | (rank == 0)
    first_failing = jnp.min(jnp.where(enough, confidence.shape[1], rank), axis=1, keepdims=True)
    return rank < first_failing
