"""Dream's sampler: one block as long as the answer, revealed along a schedule.

Source: Ye et al. 2025, "Dream 7B: Diffusion Large Language Models"; `generation_utils.py` of the
published checkpoints, whose behaviour this follows token for token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dials_jax.config import ModelConfig, Typed, require_positive
from dials_jax.errors import require
from dials_jax.nn.kernels.row_sums import logsumexp, row_softmax, row_sum
from dials_jax.sampling.confidence import gumbel_like, ranks
from dials_jax.sampling.loop import BlockSampler
from dials_jax.sampling.reveal import StepInfo

Algorithm = Literal["origin", "maskgit_plus", "topk_margin", "entropy"]

TOKEN, ORDER = 0, 1  # folded into a step's key: what the noise is for


@dataclass(frozen=True)
class Dream(Typed, BlockSampler):
    """Settings of the sampler.

    Every sequence counts its own masked tokens; the published code takes the batch's mean.

    Attributes:
      max_new_tokens: tokens to generate.
      steps: denoising steps; None: one per token. The first then reveals none and the last two.
      alg: what is revealed first: random tokens (origin), the most probable (maskgit_plus), those
        furthest ahead of the second best (topk_margin), or those predicted with the least entropy.
      temperature: of the distribution that tokens are drawn from; 0 takes the most probable.
      top_p, top_k: keep the most probable tokens only, of at least this probability together, at
        most this many. Tokens tied with the last one stay. Also at temperature 0, where they
        change the order of revealing.
      alg_temp: draw the positions to reveal, from softmax(confidence / alg_temp); None or 0 takes
        the most confident.
      eps: noise level at which the schedule ends.
    """

    max_new_tokens: int
    steps: int | None = None
    alg: Algorithm = "entropy"
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    alg_temp: float | None = None
    eps: float = 1e-3

    def __post_init__(self):
        super().__post_init__()
        if self.steps is None:
            object.__setattr__(self, "steps", self.max_new_tokens)
        require_positive(self, "max_new_tokens", "steps")
        for name in ("temperature", "alg_temp"):
            value = getattr(self, name)
            require(value is None or value >= 0, f"{name}={value} must not be negative")
        require(self.top_p is None or 0 < self.top_p <= 1, f"top_p={self.top_p} must lie in (0, 1]")
        require(self.top_k is None or self.top_k > 0, f"top_k={self.top_k} must be positive")
        require(0 < self.eps < 1, f"eps={self.eps} must lie in (0, 1)")
        require(
            not (self.alg == "origin" and self.alg_temp),
            "alg='origin' reveals random tokens and knows no alg_temp; leave it out",
        )

    def with_length(self, gen_length: int) -> Dream:
        steps = gen_length if self.steps == self.max_new_tokens else self.steps
        return replace(self, max_new_tokens=gen_length, steps=steps)

    @property
    def is_probability(self) -> bool:
        return self.alg in ("maskgit_plus", "topk_margin")

    @property
    def gen_length(self) -> int:
        return self.max_new_tokens

    @property
    def block_length(self) -> int:
        return self.max_new_tokens

    @property
    def steps_per_block(self) -> int:
        return self.steps

    @property
    def max_quota(self) -> int | None:
        """Tokens that a step reveals per sequence at most; None: any number."""
        if self.alg == "origin":
            return None
        remaining, most = self.max_new_tokens, 0
        for share in revealed_shares(self.steps, self.eps):
            quota = int(np.float32(remaining) * share)
            remaining, most = remaining - quota, max(most, quota)
        return most

    def propose(
        self, cfg: ModelConfig, logits: Float[Array, "B W V"], keys: jax.Array
    ) -> tuple[Int[Array, "B W"], Float[Array, "B W"]]:
        """A token for every position, and the model's confidence in it."""
        if self.temperature > 0:
            logits = logits / self.temperature
        logits = most_probable(logits, self.top_p, self.top_k)
        guess = jnp.argmax(logits, axis=-1)
        if self.temperature > 0:
            guess = jnp.argmax(logits + gumbel_like(logits, keys_for(TOKEN, keys)), axis=-1)
        return guess, certainty(self.alg, logits, guess)

    def choose(
        self, confidence: Float[Array, "B W"], info: StepInfo, keys: jax.Array
    ) -> Bool[Array, "B W"]:
        """The positions to reveal. Where a cache left some out, the last step is repeated."""
        step = jnp.minimum(info.step_in_block, self.steps - 1)
        share = jnp.asarray(revealed_shares(self.steps, self.eps))[step]
        keys = keys_for(ORDER, keys)
        if self.alg == "origin":
            return jax.vmap(jax.vmap(jax.random.uniform))(keys) < share
        if self.alg_temp:  # the largest of these are draws without replacement
            noise = gumbel_like(confidence[..., None], keys)[..., 0]
            confidence = confidence / self.alg_temp + noise
        quota = (info.remaining * share).astype(jnp.int32)
        return ranks(confidence) < quota[:, None]


def revealed_shares(steps: int, eps: float) -> Float[np.ndarray, "steps"]:
    """The share of the masked tokens that each step reveals; all, at the last.

    The noise level falls from 1 to eps in equal steps, and going from t to s reveals 1 - s/t. In
    float32 as published, for shares of a number of tokens may come close to whole numbers.
    """
    t = np.linspace(1, eps, steps + 1, dtype=np.float32)
    return np.append(1 - t[1:-1] / t[:-2], np.float32(1))


def most_probable(
    logits: Float[Array, "*B V"], top_p: float | None, top_k: int | None
) -> Float[Array, "*B V"]:
    """The logits with -inf for tokens outside the most probable; see `Dream`."""
    vocab_size = logits.shape[-1]
    count = min(top_k or vocab_size, vocab_size)
    top_p = None if top_p == 1 else top_p  # a sum of rounded numbers may pass 1
    if top_p is None and count == vocab_size:
        return logits
    if count == vocab_size:
        largest = jnp.sort(logits, descending=True)
    else:
        largest = lax.top_k(logits, count)[0]
    last = jnp.full(logits.shape[:-1], count - 1)
    if top_p is not None:
        probability = jnp.exp(largest - logsumexp(logits, keepdims=True))
        before = jnp.cumsum(probability, axis=-1)[..., :-1]  # of all tokens left of the next
        last = jnp.sum(before <= top_p, axis=-1)
    least = jnp.take_along_axis(largest, last[..., None], axis=-1)
    return jnp.where(logits >= least, logits, -jnp.inf)


def certainty(
    alg: Algorithm, logits: Float[Array, "B W V"], guess: Int[Array, "B W"]
) -> Float[Array, "B W"]:
    """The model's confidence in the tokens of `guess`, by the rule `alg`."""
    probabilities = row_softmax(logits)
    if alg == "entropy":
        return row_sum(probabilities * jnp.log(probabilities + 1e-10))
    if alg == "topk_margin":
        first, second = jnp.moveaxis(lax.top_k(probabilities, 2)[0], -1, 0)
        return first - second
    return jnp.take_along_axis(probabilities, guess[..., None], axis=-1)[..., 0]


def keys_for(purpose: int, keys: jax.Array) -> jax.Array:
    """Keys for independent noise of the same step."""
    return jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))(keys, purpose)
