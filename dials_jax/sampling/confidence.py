"""LLaDA's sampler: blocks from left to right, the most confident tokens of a block first.

Source: `generate.py` of ML-GSAI/LLaDA, whose behaviour this follows token for token. By default a
step reveals a fixed quota. Four rules reveal as many tokens as the model is sure of instead:

- `threshold` and `factor`: Fast-dLLM (Wu et al. 2025).
- `entropy_threshold`: `generate` of d3LLM (hao-ai-lab/d3LLM, 2026), with one block at a time. Its
  decoding of several blocks at once is not here.
- `entropy_bound`: the EB-Sampler (Ben-Hamu et al. 2025, arXiv 2505.24857) as DiffusionGemma uses it
  (`EntropyBoundSampler` of transformers, 2026). There a canvas starts from random tokens, a token
  that is not accepted is drawn again, and the entropies are of tempered logits. Here it starts from
  [MASK], accepted tokens stay, and the entropies are of the logits as they are (as in d3LLM).

With any of them, `edit_threshold` also revises what was revealed: token editing of LLaDA2.1 (2026,
arXiv 2602.08676; `generate` of inclusionAI/LLaDA2.1-mini, `JointThreshold` of SGLang). Differences:
a token never becomes [MASK] again, a probability equal to `threshold` is enough to reveal, and
probabilities are of the logits without temperature. LLaDA2.1 was trained to correct tokens that it
sees. LLaDA and Dream were not: they are revised by the same rule, but their text need not improve.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dials_jax.caching.cache import Cache
from dials_jax.config import ModelConfig, Typed, require_positive
from dials_jax.errors import require
from dials_jax.nn.kernels.row_sums import row_log_softmax, row_sum
from dials_jax.nn.policy import Policy
from dials_jax.sampling.loop import BlockSampler
from dials_jax.sampling.reveal import StepInfo
from dials_jax.sampling.sampler import log_probability_of, require_ids

# Rules of which one at most is set: a step reveals what the model is sure of, not a quota.
PARALLEL_RULES = ("threshold", "factor", "entropy_threshold", "entropy_bound")


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
      entropy_threshold: reveal every token of the block whose distribution has at most this entropy
        (nats), and always the one of least entropy (d3LLM). `steps` is then ignored.
      entropy_bound: reveal the n tokens of least entropy for the largest n whose entropies, without
        the largest, sum to at most this (nats): a bound on what the tokens say about each other
        (EB-Sampler). The first is always revealed. `steps` is then ignored.
      edit_threshold: at every step, replace every revealed token of the block by another one that
        is proposed with more than this probability (token editing). A block then ends when it is
        full and a step has replaced nothing, or after `max_edit_steps`.
      max_edit_steps: steps at most that a full block takes for editing, 16 by default.
      logits_eos_inf: never generate end of text.
      confidence_eos_eot_inf: commit end of text and end of turn last. At a temperature above 0
        the reference suppresses only end of turn, and so does this.
      delay_eos: no confidence in a sequence's first end of text while the token before it is masked
        (ES-dLLM).
      stop_at_eos: a sequence ends at an end of text once all before it is known; what is masked
        then is filled with end of text, and costs no more steps.
      stop_ids: a sequence ends with the block in which one of these tokens is. The block is kept
        whole; the rest is filled with end of text, and costs no more steps (iLLaDA).
      append_blocks: masks are appended one block at a time. Later ones are no part of the sequence
        yet, so nothing attends to them, and a sequence that ends early was never longer
        (`var_generate` of iLLaDA, whose `steps` are those of one block: here they are of all).
      end_think_ids: tokens that end the model's thinking, as those of `</think>`. Until they are in
        the answer, the next of them gains logits at the leftmost masked position of the block
        (iLLaDA): `end_think_boost` times the position's share of `gen_length`, from 1 token on, to
        the power of `end_think_power`.
    """

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
    entropy_threshold: float | None = None
    entropy_bound: float | None = None
    edit_threshold: float | None = None
    max_edit_steps: int | None = None
    stop_ids: tuple[int, ...] = ()
    append_blocks: bool = False
    end_think_ids: tuple[int, ...] = ()
    end_think_boost: float = 0.0
    end_think_power: float = 2.0

    def __post_init__(self):
        super().__post_init__()
        if self.edits and self.max_edit_steps is None:
            object.__setattr__(self, "max_edit_steps", 16)
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
        for name in ("temperature", "cfg_scale", "end_think_boost", "end_think_power"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative")
        for name in (*PARALLEL_RULES, "edit_threshold", "max_edit_steps"):
            value = getattr(self, name)
            require(value is None or value >= 0, f"{name}={value} must not be negative")
        require(
            bool(self.end_think_ids) == (self.end_think_boost > 0),
            f"end_think_ids={self.end_think_ids} and end_think_boost={self.end_think_boost}: give "
            "both the tokens and their gain, or neither",
        )
        self._check_rules()

    def check(
        self,
        cfg: ModelConfig,
        present: Bool[np.ndarray, "B P"],
        policy: Policy | None,
        cache: Cache | None,
    ) -> None:
        super().check(cfg, present, policy, cache)
        require_ids(cfg, stop_ids=self.stop_ids, end_think_ids=self.end_think_ids)
        for name in ("logits_eos_inf", "confidence_eos_eot_inf"):
            require(
                not getattr(self, name) or cfg.model_type != "illada",
                f"{name}=True is LLaDA's: the published code suppresses ids 126081 and 126348, "
                "which are ordinary tokens of iLLaDA; leave it out",
            )

    def _check_rules(self) -> None:
        given = [name for name in PARALLEL_RULES if getattr(self, name) is not None]
        require(
            len(given) <= 1,
            f"{' and '.join(given)} are rules for the same choice; give one of them",
        )
        for name, value, default in (
            ("remasking", self.remasking, "low_confidence"),
            ("confidence_eos_eot_inf", self.confidence_eos_eot_inf, False),
            ("delay_eos", self.delay_eos, False),
        ):
            require(
                not self.orders_by_entropy or value == default,
                f"{name}={value!r} changes the confidence of a token, but {''.join(given)} goes by "
                "the entropy of its distribution; leave one of them out",
            )
        require(
            self.remasking == "low_confidence" or not given,
            f"{''.join(given)} goes by confidence, remasking={self.remasking!r} does not; leave "
            "out one of them",
        )
        for name in ("threshold", "edit_threshold"):
            value = getattr(self, name)
            require(value is None or value <= 1, f"{name}={value} is a probability; at most 1")
        require(
            not self.edits or bool(given),
            "edit_threshold revises what was revealed too early, not what a quota reveals; give "
            f"one of {', '.join(PARALLEL_RULES)}, too",
        )
        require(
            self.edits or self.max_edit_steps is None,
            "max_edit_steps is for editing; give edit_threshold, too, or leave it out",
        )

    def with_length(self, gen_length: int) -> Confidence:
        follow = {
            name: gen_length if getattr(self, name) == self.gen_length else getattr(self, name)
            for name in ("block_length", "steps")
        }
        if self.append_blocks:  # a block has as many steps as before
            blocks = gen_length // follow["block_length"]
            follow["steps"] = self.steps // self.num_blocks * max(blocks, 1)
        return replace(self, gen_length=gen_length, **follow)

    @property
    def num_blocks(self) -> int:
        return self.gen_length // self.block_length

    @property
    def orders_by_entropy(self) -> bool:
        """Whether the confidence is an entropy, negated."""
        return self.entropy_threshold is not None or self.entropy_bound is not None

    @property
    def is_probability(self) -> bool:
        return not self.orders_by_entropy

    @property
    def edits(self) -> bool:
        return self.edit_threshold is not None

    @property
    def full_steps(self) -> int:
        return self.max_edit_steps or 0

    @property
    def steps_per_block(self) -> int:
        """At most: a step that reveals nothing need not be made."""
        if self.max_quota is None:
            return self.block_length
        return min(self.steps // self.num_blocks, self.block_length)

    @property
    def max_quota(self) -> int | None:
        """Tokens that a step reveals per sequence at most; None: any number."""
        if any(getattr(self, name) is not None for name in PARALLEL_RULES):
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
        if self.entropy_threshold is not None:
            return (-confidence <= self.entropy_threshold) | (ranks(confidence) == 0)
        if self.entropy_bound is not None:
            return within_entropy_bound(-confidence, self.entropy_bound)
        quota = step_quota(info.present, info.step_in_block, self.steps_per_block)
        return ranks(confidence) < quota[:, None]

    def revise(
        self,
        logits: Float[Array, "B W V"],
        guess: Int[Array, "B W"],
        tokens: Int[Array, "B W"],
    ) -> Bool[Array, "B W"]:
        return (guess != tokens) & (probability_of(guess, logits) > self.edit_threshold)


def propose(
    sampler: Confidence,
    cfg: ModelConfig,
    logits: Float[Array, "B W V"],
    keys: jax.Array,
) -> tuple[Int[Array, "B W"], Float[Array, "B W"]]:
    """A token for every position, and the model's confidence in it: a probability or -entropy."""
    if sampler.logits_eos_inf:
        logits = logits.at[..., cfg.eos_id].set(-jnp.inf)
    noisy = logits
    if sampler.temperature > 0:
        # argmax(logits + T * Gumbel) is the reference's argmax of exp(logits) / (-ln u)^T.
        noisy = logits + sampler.temperature * gumbel_like(logits, keys)
    guess = jnp.argmax(noisy, axis=-1)
    if sampler.orders_by_entropy:
        return guess, -entropy_of(logits)
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
    return guess, probability_of(guess, logits)


def probability_of(tokens: Int[Array, "B W"], logits: Float[Array, "B W V"]) -> Float[Array, "B W"]:
    return jnp.exp(log_probability_of(tokens, logits))


def entropy_of(logits: Float[Array, "B W V"]) -> Float[Array, "B W"]:
    """Of the distribution over tokens, in nats. A token whose logit is -inf adds nothing."""
    log_p = row_log_softmax(logits)
    return -row_sum(jnp.where(jnp.isfinite(log_p), jnp.exp(log_p) * log_p, 0.0))


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


def within_entropy_bound(entropy: Float[Array, "B W"], bound: float) -> Bool[Array, "B W"]:
    """The largest set, in order of entropy, whose entropies sum to `bound` without the largest.

    Infinite where there is nothing to reveal.
    """
    smaller = jnp.cumsum(jnp.sort(entropy, axis=-1), axis=-1)[:, :-1]  # of all left of the next
    count = 1 + jnp.sum(smaller <= bound, axis=-1, keepdims=True)
    return ranks(-entropy) < count
