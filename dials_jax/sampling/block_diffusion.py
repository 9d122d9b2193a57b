"""Block diffusion: generation by block-causal models, block after block.

    canvas         | prompt, whole blocks | p p . . | . . . . | . . . .      . is masked
    model calls    |<---- the prompt ---->|<------->| steps, and one more that stores the block
                                                    |<------->| ...

Blocks count from each sequence's first token, so the end of a prompt shares its block with the
first tokens of the answer. A batch is laid out so that these blocks lie at the same place in all
sequences. What is stored never changes again, since nothing sees a block to its right: see
`PrefixCache` and `DualCache`. Without a cache, and without a shift, there is nothing to store.

Sources:
- SDAR (JetLM/SDAR, 2025): `generate` of the evaluation code. Each step reveals all tokens above
  `threshold`, and at least a quota. Logits are those of the token at their position.
  `entropy_bound` is `entropy_bounded` of its inference engine (JetEngine).
- Fast-dLLM v2 (Wu et al. 2025, arXiv 2509.26328): `generate` of NVlabs/Fast-dLLM, in sub-blocks.
  Logits are those of the next token, so a block's first token comes out of the call that stores
  the block before it, or the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from dials_jax.caching.cache import Blocks, Cache, Work
from dials_jax.caching.canvas import CanvasModel
from dials_jax.caching.plain import NoCache
from dials_jax.config import ModelConfig, Typed, require_positive
from dials_jax.errors import require
from dials_jax.models import transformer
from dials_jax.nn.policy import Policy
from dials_jax.sampling.confidence import entropy_of, gumbel_like, probability_of, ranks
from dials_jax.sampling.dream import most_probable
from dials_jax.sampling.end_of_text import from_eos_on
from dials_jax.sampling.loop import BlockSampler, Loop, LoopState, variant_work
from dials_jax.sampling.reveal import StepInfo
from dials_jax.sampling.sampler import require_ids


@dataclass(frozen=True)
class BlockDiffusion(Typed, BlockSampler):
    """Settings of the sampler.

    [MASK] is never proposed; the published codes fail or never end where the model predicts it.

    Attributes:
      gen_length: tokens to generate. The last block is filled, and what was not asked for cut.
      block_length: tokens per block, which attention goes by, too: those that the model was trained
        with. The published default is that of the model's configuration (SDAR), or 32.
      steps_per_block: denoising steps, each of which reveals an equal part of a block. None: one
        token per step. A block of which the prompt has a part takes fewer steps.
      remasking: reveal the most confident tokens, or from left to right (sequential).
      threshold: also reveal every token of more than this probability. None: the quota only.
      entropy_bound: instead reveal the tokens of least entropy, as many as have together less than
        this (nats), and always the first (SDAR, 0.35 there). Unlike that of `Confidence` the
        largest counts, too. The entropy is that of the confidence's distribution.
      sub_block_length: fill the parts of a block from left to right (Fast-dLLM v2). None: a block
        is one part.
      temperature: of the distribution that tokens are drawn from; 0 takes the most probable. The
        confidence is the probability under it, before `top_p` and `top_k`.
      top_p, top_k: draw from the most probable tokens only, as in `Dream`.
      stop_at_eos: a sequence ends at an end of text once all before it is known, without another
        call (Fast-dLLM v2); the rest is filled with end of text.
      stop_ids: a sequence ends with the block in which one of these tokens is, and which is kept
        whole (SDAR); the rest is filled with end of text.
    """

    gen_length: int
    block_length: int
    steps_per_block: int | None = None
    remasking: Literal["low_confidence", "sequential"] = "low_confidence"
    threshold: float | None = None
    sub_block_length: int | None = None
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    stop_at_eos: bool = False
    stop_ids: tuple[int, ...] = ()
    entropy_bound: float | None = None

    max_quota = None
    append_blocks = True
    full_steps = 1
    takes_schedule = False

    def __post_init__(self):
        super().__post_init__()
        if self.steps_per_block is None:
            object.__setattr__(self, "steps_per_block", self.block_length)
        require_positive(self, "gen_length", "block_length", "steps_per_block")
        length, steps, part = self.block_length, self.steps_per_block, self.sub_block_length
        require(
            steps <= length,
            f"steps_per_block={steps}: a block of block_length={length} has no token for each",
        )
        require(
            part is None or (part > 0 and length % part == 0),
            f"sub_block_length={part} must divide block_length={length}",
        )
        require(
            part is None or steps == length,
            f"sub_block_length={part} knows no quota; leave out steps_per_block, and give "
            "threshold to reveal several tokens per step",
        )
        require(
            self.threshold is None or self.remasking == "low_confidence",
            "threshold goes by confidence, remasking='sequential' from left to right; leave out "
            "one of them",
        )
        for name in ("threshold", "entropy_bound"):
            value = getattr(self, name)
            require(value is None or value >= 0, f"{name}={value} must not be negative")
        require(
            self.threshold is None or self.threshold <= 1,
            f"threshold={self.threshold} is a probability; at most 1",
        )
        require(
            self.entropy_bound is None
            or (self.threshold is None and self.remasking == "low_confidence" and steps == length),
            "entropy_bound is a rule of its own; leave out threshold, remasking and "
            "steps_per_block",
        )
        require(self.temperature >= 0, f"temperature={self.temperature} must not be negative")
        require(self.top_p is None or 0 < self.top_p <= 1, f"top_p={self.top_p} must lie in (0, 1]")
        require(self.top_k is None or self.top_k > 0, f"top_k={self.top_k} must be positive")

    @property
    def is_probability(self) -> bool:
        return self.entropy_bound is None

    def check(
        self,
        cfg: ModelConfig,
        present: Bool[np.ndarray, "B P"],
        policy: Policy | None,
        cache: Cache | None,
    ) -> None:
        require(
            cfg.block_length is not None,
            f"BlockDiffusion generates by block-causal models, and {cfg.model_type} is none; take "
            "Confidence",
        )
        require(
            not cfg.right_shift or self.block_length > 1,
            "block_length=1: a block's first token comes out of the block before it, which leaves "
            "no token to fill; give at least 2",
        )
        require_ids(cfg, stop_ids=self.stop_ids)
        require(
            cache is None or not cache.drops_tokens,
            f"{type(cache).__name__} follows a canvas that every token sees, not one of finished "
            "blocks; take PrefixCache, or DualCache for sub-blocks",
        )
        require(
            not cfg.right_shift or bool(present.any(axis=1).all()),
            "a prompt is empty, but this model predicts a token from the one before; begin it with "
            "a token such as end of text",
        )

    # ----------------------------------------------------------------------- where tokens lie

    def blocks(self, prompt_length: int) -> Blocks:
        """The blocks to fill, whatever part of the first one the prompts take."""
        start = prompt_length - prompt_length % self.block_length
        count = -(-(self.gen_length + self.block_length - 1) // self.block_length)
        part = None if self.sub_block_length == self.block_length else self.sub_block_length
        return Blocks(start, self.block_length, count, None, appended=True, causal=True, part=part)

    def block_end(self, cfg: ModelConfig, tails: Int[Array, "B"]) -> Int[Array, "B"]:
        """Tokens from the first block on until each sequence ends: whole blocks, and in a shifted
        model the token that comes out of the last one. Args: tails: prompt tokens of these."""
        shift, length = int(cfg.right_shift), self.block_length
        return -(-(tails + self.gen_length - shift) // length) * length + shift

    def tails(
        self, prompts: Int[Array, "B P"], valid: Bool[Array, "B P"] | None
    ) -> Int[Array, "B"]:
        """The prompt tokens that share a block with the answer."""
        batch, length = prompts.shape
        count = jnp.full(batch, length) if valid is None else jnp.sum(valid, axis=1)
        return count % self.block_length

    def lay_out(
        self, cfg: ModelConfig, prompts: Int[Array, "B P"], valid: Bool[Array, "B P"] | None
    ) -> tuple[Int[Array, "B T"], Bool[Array, "B T"] | None, int]:
        """The canvas, where it is no padding, and where the first block begins."""
        blocks, width = self.blocks(prompts.shape[1]), prompts.shape[1]
        tails, place = self.tails(prompts, valid), jnp.arange(blocks.end)
        source = place - tails[:, None] + width % self.block_length  # in the prompts as given
        is_prompt = (source >= 0) & (source < width)

        def moved(x: Array) -> Array:
            x = jnp.pad(x, ((0, 0), (0, 1)))  # there may be no prompts
            return jnp.take_along_axis(x, jnp.clip(source, 0, width), axis=1)

        to_fill = place < blocks.start + self.block_end(cfg, tails)[:, None]
        answer = jnp.where(to_fill, cfg.mask_id, cfg.pad_id).astype(prompts.dtype)
        before = jnp.where(source < 0, jnp.asarray(cfg.pad_id, prompts.dtype), answer)
        canvas = jnp.where(is_prompt, moved(prompts), before)
        if valid is not None:
            valid = jnp.where(is_prompt, moved(valid), source >= width)
        return canvas, valid, blocks.start

    def lay_back(
        self,
        canvas: Shaped[Array, "B T"],
        prompts: Int[Array, "B P"],
        valid: Bool[Array, "B P"] | None,
    ) -> Shaped[Array, "B _"]:
        """What `lay_out` arranged, or numbers about it: prompts and answers as they are given.

        Padding may come out as any other position.
        """
        length = prompts.shape[1]
        moved = self.tails(prompts, valid)[:, None] - length % self.block_length
        index = jnp.arange(length + self.gen_length) + moved
        return jnp.take_along_axis(canvas, jnp.maximum(index, 0), axis=1)

    def make_steps(
        self, net: CanvasModel, prompt_length: int, keys: jax.Array, cache: Cache
    ) -> BlockLoop:
        inputs, cfg = net.block_inputs, replace(net.cfg, block_length=self.block_length)
        mask = replace(inputs.mask, block_length=self.block_length)
        net = replace(net, cfg=cfg, block_inputs=inputs._replace(mask=mask))
        return BlockLoop(self, cache, net, prompt_length, keys)

    def work(self, cfg: ModelConfig, cache: Cache, prompt_length: int) -> list[Work]:
        blocks = self.blocks(prompt_length)
        return variant_work(cfg, cache, blocks, blocks.end, blocks.start)

    # ------------------------------------------------------------------- what a step reveals

    def propose(
        self, cfg: ModelConfig, logits: Float[Array, "B W V"], keys: jax.Array
    ) -> tuple[Int[Array, "B W"], Float[Array, "B W"]]:
        if self.temperature > 0:
            logits = logits / self.temperature
        drawn = transformer.suppress_mask_token(cfg, logits)
        if self.temperature > 0:
            drawn = most_probable(drawn, self.top_p, self.top_k)
            drawn = drawn + gumbel_like(drawn, keys)
        guess = jnp.argmax(drawn, axis=-1)
        if self.entropy_bound is not None:
            return guess, -entropy_of(logits)
        return guess, probability_of(guess, logits)

    def choose(
        self, confidence: Float[Array, "B W"], info: StepInfo, keys: jax.Array
    ) -> Bool[Array, "B W"]:
        """Tokens of the first part that has masked ones. The next block's first is one by itself:
        it is known as soon as this block is."""
        length, part = self.block_length, self.sub_block_length or self.block_length
        masked = ~jnp.isneginf(confidence)
        first = jnp.min(jnp.where(masked, info.place, length), axis=1, keepdims=True)
        masked &= info.place // part == first // part
        order = -info.place if self.remasking == "sequential" else confidence
        order = jnp.where(masked, order, -jnp.inf)
        if self.entropy_bound is not None:
            total = jnp.cumsum(jnp.sort(-order, axis=-1), axis=-1)
            count = jnp.sum(total < self.entropy_bound, axis=-1, keepdims=True)
            return masked & (ranks(order) < jnp.maximum(count, 1))
        quota, more = divmod(length, self.steps_per_block)
        chosen = ranks(order) < quota + (info.step_in_block < more)
        if self.threshold is not None:
            chosen |= confidence > self.threshold
        return masked & chosen


class BlockLoop(Loop):
    """The loop over blocks that count from each sequence's first token."""

    def __init__(
        self,
        sampler: BlockDiffusion,
        cache: Cache,
        net: CanvasModel,
        prompt_length: int,
        noise_keys: jax.Array,
    ):
        super().__init__(sampler, cache, net, prompt_length, noise_keys)
        stores = net.cfg.right_shift or not isinstance(cache, NoCache)
        self.full_steps = int(stores)
        self.calls_before = int(stores and self.blocks.start > 0)

    def start(self, canvas: Int[Array, "B T"], num_layers: int) -> LoopState:
        state = super().start(canvas, num_layers)
        start = self.blocks.start
        tails = jnp.argmax(transformer.is_masked(self.net.cfg, canvas[:, start:]), axis=1)
        state = state._replace(answer_start=start + tails)
        if not self.calls_before:
            return state
        first = jnp.where(jnp.any(self.has_whole_blocks(canvas)), -1, 0)
        return state._replace(step_in_block=first.astype(jnp.int32))

    def has_whole_blocks(self, canvas: Int[Array, "B T"]) -> Bool[Array, "B"]:
        """Sequences whose prompt fills a block."""
        valid, last = self.net.block_inputs.mask.valid, self.blocks.start - 1
        return jnp.ones(len(canvas), bool) if valid is None else valid[:, last]

    def is_unfinished(self, state: LoopState) -> Bool[Array, "B"]:
        unfinished = super().is_unfinished(state)
        if not self.calls_before:
            return unfinished
        return jnp.where(state.step_in_block < 0, self.has_whole_blocks(state.tokens), unfinished)

    def next_step(self, state: LoopState) -> LoopState:
        after = super().next_step(state)
        if not self.calls_before:
            return after
        # The prompt's call may have ended all: it gave the only token asked for, or an end of text.
        left = jnp.any(self.masked_by_block(state.tokens))
        first = jnp.where(left, 0, self.blocks.count).astype(jnp.int32)
        before = state.step_in_block < 0
        return after._replace(
            block=jnp.where(before, first, after.block),
            step_in_block=jnp.where(before, 0, after.step_in_block),
        )

    def generated(self, state: LoopState) -> Int[Array, "B G"]:
        """Without what fills the canvas behind a sequence's last block, too."""
        answer, start = super().generated(state), self.blocks.start
        end = self.sampler.block_end(self.net.cfg, state.answer_start - start)[:, None]
        return jnp.where(jnp.arange(answer.shape[1]) < end, answer, -1)

    def end_at_eos(self, state: LoopState) -> LoopState:
        """Ends sequences at an end of text: their block is not stored."""
        cfg, start = self.net.cfg, self.blocks.start
        generated = self.generated(state)
        ended = from_eos_on(cfg, generated)
        fill = ended & transformer.is_masked(cfg, generated)
        tokens = state.tokens.at[:, start:].set(
            jnp.where(fill, cfg.eos_id, state.tokens[:, start:])
        )
        left = state.full_steps_left
        if left is not None:
            left = jnp.where(jnp.any(ended, axis=1), 0, left)
        return state._replace(tokens=tokens, full_steps_left=left)
