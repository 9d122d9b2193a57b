"""The denoising loop: every sampler over every cache, as one program.

    generation   | block 0                     | block 1                     | ...
    step         | 0     1     2     3         | 4     5     6     7         |
    variant      | whole block block block     | whole block block block     |    (DualCache)
                   |     |
                   |     +- one forward call of a variant, then the tokens that it reveals
                   +------- the first of the cache's variants that is due

A *block* of the canvas is filled before the next one starts. A *step* is one forward call of the
model, and the tokens that the sampler reveals. What a call computes is a *variant*: all variants of
a cache are compiled, and nothing returns to the host before the end.

Where each step reveals a fixed quota (`is_fixed`), the variant of every step is known in advance:
the steps are loops of constant length, in a program or in several (`timetable.py`). Otherwise the
device checks before each step which variant is due, and ends when no sequence has a masked token
left.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from dials_jax.caching.cache import (
    Blocks,
    Cache,
    ForwardInputs,
    ForwardOutputs,
    ForwardVariant,
    Revealed,
    Work,
)
from dials_jax.caching.canvas import CanvasModel
from dials_jax.config import ModelConfig
from dials_jax.errors import require
from dials_jax.models import transformer
from dials_jax.nn.policy import Policy
from dials_jax.sampling.end_of_text import after_stop, fill_after_eos
from dials_jax.sampling.reveal import (
    StepInfo,
    StepSampler,
    position_keys,
    reveal,
    write_log_probs,
)
from dials_jax.sampling.sampler import (
    CallRecord,
    append_call,
    start_record,
)
from dials_jax.sampling.timetable import Loops, divide_blocks, run_loops
from dials_jax.sampling.trajectory import append_canvas
from dials_jax.sharding import constrain_batch


class BlockSampler(StepSampler):
    """A sampler that fills blocks from left to right and reveals tokens by their confidence.

    A class of this kind is a frozen dataclass (or another class with `with_length`), sets the
    attributes below, and says with `propose` and `choose` which tokens a step reveals.

    Attributes:
      steps_per_block: at most; a block also ends when it is full.
      max_quota: tokens that a step reveals per sequence at most; None: any number.
      is_probability: whether confidences lie in [0, 1].
      full_steps: steps at most that a full block takes, for editing or storing it.
      stop_at_eos, stop_ids, append_blocks: see `Confidence`.
    """

    gen_length: int
    block_length: int
    steps_per_block: int
    max_quota: int | None
    is_probability: bool
    full_steps = 0
    stop_at_eos = False
    stop_ids: tuple[int, ...] = ()
    append_blocks = False
    takes_schedule = True
    one_program = True
    gives_log_probs = True
    gives_trajectory = True

    def check(
        self,
        cfg: ModelConfig,
        present: Bool[np.ndarray, "B P"],
        policy: Policy | None,
        cache: Cache | None,
    ) -> None:
        cfg.require_mask()
        require(
            not cfg.time_conditioning,
            f"{type(self).__name__} has no denoising time to tell a model with "
            "time_conditioning; sample with Ancestral",
        )

    def with_length(self, gen_length: int) -> BlockSampler:
        return replace(self, gen_length=gen_length)

    def blank_id(self, cfg: ModelConfig) -> int:
        return cfg.mask_id

    def blocks(self, prompt_length: int) -> Blocks:
        """The blocks of an answer that begins at this position."""
        count = self.gen_length // self.block_length
        return Blocks(prompt_length, self.block_length, count, self.max_quota, self.append_blocks)

    def count_steps(self, cache: Cache) -> int:
        """Steps of all blocks, at most."""
        return self.blocks(0).count * step_limit(self, cache)

    def parts(self, cfg: ModelConfig, cache: Cache, prompt_length: int) -> list[Loops]:
        """All steps, in the parts that are programs; none where the steps depend on the text."""
        check_cache(self, cache)
        if not is_fixed(self, cache):
            return []
        blocks = self.blocks(prompt_length)
        variants = sketch_variants(cfg, cache, blocks, prompt_length + self.gen_length)
        of_blocks = divide_blocks(variants, blocks, step_limit(self, cache))
        return [part for parts in of_blocks for part in parts]

    def make_steps(
        self, net: CanvasModel, prompt_length: int, keys: jax.Array, cache: Cache
    ) -> Loop:
        return Loop(self, cache, net, prompt_length, keys)

    def work(self, cfg: ModelConfig, cache: Cache, prompt_length: int) -> list[Work]:
        known = prompt_length if self.cfg_scale == 0 else 0
        length = prompt_length + self.gen_length
        return variant_work(cfg, cache, self.blocks(prompt_length), length, known)


def check_cache(sampler: BlockSampler, cache: Cache) -> None:
    """Raises: InputError for a cache that a sampler does not compose with."""
    require(
        sampler.is_probability or not cache.drops_tokens,
        "EarlySkip weighs confidence against change, so it must be like a probability, and an "
        "entropy is not; use threshold= or factor=, or alg='maskgit_plus' or 'topk_margin'",
    )
    require(
        not (sampler.edits and cache.drops_tokens),
        "EarlySkip leaves revealed tokens out, so they cannot be revised; leave out "
        "edit_threshold, or take PrefixCache or DualCache",
    )
    require(
        not (sampler.append_blocks and cache.drops_tokens),
        "EarlySkip computes the whole canvas first, so it needs all blocks from the start; "
        "leave out append_blocks, or take DualCache",
    )
    require(
        not sampler.edits or sampler.max_quota is None,
        "a sampler with a fixed quota does not edit; set max_quota=None",
    )


class LoopState(NamedTuple):
    """Where the loop stands before a step.

    Attributes:
      present: see `StepInfo`.
      full_steps_left: steps at most that a block may still take once it is full; None if none may.
      answer_start: where each sequence's answer begins; None: where the first block does.
    """

    tokens: Int[Array, "B T"]
    block: Int[Array, ""]
    step_in_block: Int[Array, ""]
    present: Int[Array, "B"]
    full_steps_left: Int[Array, "B"] | None
    cache_state: PyTree
    record: CallRecord
    answer_start: Int[Array, "B"] | None = None


def variant_work(
    cfg: ModelConfig, cache: Cache, blocks: Blocks, length: int, prompt_length: int
) -> list[Work]:
    """What each variant of a cache computes per sequence on a canvas of `length` tokens.

    Args:
      prompt_length: this many first tokens no router looks at.
    """
    return [v.work for v in sketch_variants(cfg, cache, blocks, length, prompt_length)]


def sketch_variants(
    cfg: ModelConfig, cache: Cache, blocks: Blocks, length: int, prompt_length: int = 0
) -> list[ForwardVariant]:
    """The variants of a cache, of which only `due` and `work` can be used: there is no model."""
    inputs = jax.eval_shape(lambda: transformer.block_inputs(cfg, None, (1, length)))
    sketch = CanvasModel(cfg, None, None, "auto", inputs, None, None, prompt_length)
    return cache.forward_variants(sketch, blocks)


def step_limit(sampler: BlockSampler, cache: Cache) -> int:
    """Steps of a block at most. They bound the record of model calls, too.

    A full block may take further steps. Where a cache skips masked tokens in a call, a
    step may find fewer of them than its quota. The block then takes more steps than the sampler's
    own, each of which reveals at least one token. A quota of one is always found: the leftmost
    masked token is never skipped.
    """
    if not cache.drops_tokens or sampler.max_quota in (None, 1) or is_fixed(sampler, cache):
        return sampler.steps_per_block + sampler.full_steps
    return sampler.steps_per_block + sampler.block_length


def is_fixed(sampler: BlockSampler, cache: Cache) -> bool:
    """Whether all steps are known beforehand: each reveals its quota, none ends early.

    The loops then have constant trip counts. The device waits for a condition only where the
    variant of a step depends on the block.
    """
    ends_early = sampler.stop_at_eos or bool(sampler.stop_ids)
    by_quota = sampler.max_quota is not None and not ends_early
    return by_quota and not (cache.drops_tokens and sampler.max_quota > 1)


class Loop:
    """The steps of one generation, as functions from state to state.

    Attributes:
      full_steps: see `BlockSampler`.
      calls_before: model calls before the first step, which then has number -1.
    """

    calls_before = 0

    def __init__(
        self,
        sampler: BlockSampler,
        cache: Cache,
        net: CanvasModel,
        prompt_length: int,
        noise_keys: jax.Array,
    ):
        check_cache(sampler, cache)
        self.sampler, self.cache, self.net = sampler, cache, net
        self.blocks, self.full_steps = sampler.blocks(prompt_length), sampler.full_steps
        self.noise_keys = noise_keys
        self.variants = cache.forward_variants(net, self.blocks)
        self.limit = step_limit(sampler, cache)
        self.num_steps = sampler.count_steps(cache)

    def start(self, canvas: Int[Array, "B T"], num_layers: int) -> LoopState:
        num_sequences, zero = canvas.shape[0], jnp.asarray(0, jnp.int32)
        observed = self.net.start_observing(canvas)
        record = start_record(
            self.num_steps + self.calls_before,
            num_layers,
            num_sequences,
            self.net.num_sequences,
            observed,
        )
        cache_state = self.cache.init_state(self.net, self.blocks)
        none = constrain_batch(jnp.zeros(num_sequences, jnp.int32))
        full_steps_left = none if self.full_steps else None
        return LoopState(canvas, zero, zero, none, full_steps_left, cache_state, record)

    def run(self, state: LoopState, stop: Int[Array, ""] | None = None) -> LoopState:
        """Takes the steps before number `stop`; None: all of them."""
        if stop is None and is_fixed(self.sampler, self.cache):
            first, *others = divide_blocks(self.variants, self.blocks, self.limit)
            if all(parts == first for parts in others):
                return self.run_part(((self.blocks.count, sum(first, ())),), state)
        return self.run_until(state, self.num_steps if stop is None else stop)

    def run_part(self, part: Loops, state: LoopState) -> LoopState:
        """Takes steps that are known beforehand: see `BlockSampler.parts`."""
        return run_loops(part, self.run_step, state)

    def step_number(self, state: LoopState) -> Int[Array, ""]:
        """The step that comes next, counted through all blocks."""
        return state.block * self.limit + state.step_in_block

    def run_until(self, state: LoopState, stop: Int[Array, ""] | int) -> LoopState:
        """Takes the steps before number `stop`, by variants in any order."""
        one_round = partial(self.run_in_turn, stop=stop)
        return lax.while_loop(lambda s: self.step_number(s) < stop, one_round, state)

    def run_in_turn(self, state: LoopState, stop: Int[Array, ""] | int) -> LoopState:
        """Runs each variant for as long as it is due, one after the other, before step `stop`.

        Loops one after the other, not a `lax.switch`: a loop updates the cache in place.
        """
        for number in range(len(self.variants)):
            state = lax.while_loop(
                lambda s, n=number: self.is_due(n, s) & (self.step_number(s) < stop),
                partial(self.run_step, number),
                state,
            )
        return state

    def is_due(self, number: int, state: LoopState) -> Bool[Array, ""] | bool:
        """Whether this variant is due, and none before it."""
        at = state.block, state.step_in_block, state.cache_state
        *earlier, due = (variant.due(*at) for variant in self.variants[: number + 1])
        for other in earlier:
            due &= ~other
        return due

    def run_step(self, variant: int, state: LoopState) -> LoopState:
        """One forward call, the tokens it reveals, and the step that follows."""
        sampler, first = self.sampler, state.step_in_block == 0
        masked, block = self.masked_by_block(state.tokens), self.place_of(state.block)
        remaining = jnp.sum(jnp.take(masked, block, axis=1), axis=1)
        state = state._replace(present=jnp.where(first, remaining, state.present))
        if self.full_steps:
            left = jnp.where(first, self.full_steps, state.full_steps_left)
            state = state._replace(full_steps_left=left)
        step, unfinished = self.step_number(state), self.is_unfinished(state)
        inputs = ForwardInputs(
            state.tokens, self.own_step(step), block, state.step_in_block, unfinished
        )
        out = self.variants[variant].forward(inputs, state.cache_state)
        place = out.index - self.blocks.start - block * self.blocks.length
        info = StepInfo(state.step_in_block, state.present, remaining, place)
        tokens, revealed = self.reveal(out, inputs, info, state.record.log_probs is not None)
        share, record = self.masked_share(masked, state.block), state.record
        observed = self.net.observe(record.observed, out.seen, inputs.step, unfinished)
        record = append_call(record, out.gates, share, variant, step, unfinished, observed)
        state = state._replace(
            tokens=tokens,
            cache_state=self.cache.after_reveal(out.cache_state, revealed, self.net),
            record=record._replace(log_probs=write_log_probs(record.log_probs, revealed)),
        )
        if self.full_steps:
            left = state.full_steps_left
            spent = jnp.where(jnp.any(revealed.commit, axis=1), left - 1, 0)
            state = state._replace(full_steps_left=jnp.where(remaining > 0, left, spent))
        if sampler.stop_at_eos:
            state = self.end_at_eos(state)
        if sampler.stop_ids:
            state = self.end_at_stop(state)
        record = append_canvas(state.record, state.tokens, out.depth)
        return self.next_step(state._replace(record=record))

    def is_unfinished(self, state: LoopState) -> Bool[Array, "B"]:
        """Sequences with masked tokens in the block, or with steps left for a full one."""
        block = self.place_of(state.block)
        masked = jnp.take(self.masked_by_block(state.tokens), block, axis=1)
        unfinished = jnp.any(masked, axis=1)
        if state.full_steps_left is None:
            return unfinished
        return unfinished | (state.present > 0) & (state.full_steps_left > 0)

    def end_at_eos(self, state: LoopState) -> LoopState:
        """Fills what follows an end of text. One that may still be edited ends nothing yet."""
        filled = self.fill_after_eos(state.tokens)
        if self.sampler.edits:
            filled = jnp.where(self.is_unfinished(state)[:, None], state.tokens, filled)
        return state._replace(tokens=filled)

    def end_at_stop(self, state: LoopState) -> LoopState:
        """At a block's end, fills what follows it with end of text where there is a stop token."""
        blocks, record = self.blocks, state.record
        ends = self.next_step(state).block > state.block
        after = after_stop(
            self.generated(state), self.sampler.stop_ids, (state.block + 1) * blocks.length
        )
        after &= ends
        canvas = state.tokens[:, blocks.start :]
        filled = jnp.where(after, self.net.cfg.eos_id, canvas)
        tokens = state.tokens.at[:, blocks.start :].set(filled)
        if record.log_probs is not None:  # a block-causal model may know the next block's first
            known = jnp.where(after, jnp.nan, record.log_probs[:, blocks.start :])
            log_probs = record.log_probs.at[:, blocks.start :].set(known)
            record = record._replace(log_probs=log_probs)
        return state._replace(tokens=tokens, record=record)

    def generated(self, state: LoopState) -> Int[Array, "B G"]:
        """The canvas from the first block on; -1 where a prompt reaches into that."""
        answer = state.tokens[:, self.blocks.start :]
        if state.answer_start is None:
            return answer
        start = state.answer_start[:, None] - self.blocks.start
        return jnp.where(jnp.arange(answer.shape[1]) < start, -1, answer)

    def reveal(
        self, out: ForwardOutputs, inputs: ForwardInputs, info: StepInfo, with_log_probs: bool
    ) -> tuple[Int[Array, "B T"], Revealed]:
        """The canvas after a forward call, and what the cache is told of it."""
        keys = position_keys(self.noise_keys, inputs.step, self.answer_positions(out.index))
        parts = self.sampler, self.net, self.blocks
        return reveal(*parts, out, inputs, info, keys, with_log_probs=with_log_probs)

    def next_step(self, state: LoopState) -> LoopState:
        """The state at the block and step after this one.

        The block stays while a sequence is unfinished and steps are left; then comes the next block
        with masks. If all steps are fixed, every block takes all of its steps.
        """
        more = state.step_in_block + 1 < self.limit
        number, later = jnp.arange(self.blocks.count), state.block + 1
        if not is_fixed(self.sampler, self.cache):
            has = jnp.any(self.masked_by_block(state.tokens), axis=(0, 2))
            more &= jnp.any(self.is_unfinished(state))
            later = jnp.min(jnp.where(has & (number >= later), number, self.blocks.count))
        block = jnp.where(more, state.block, later).astype(jnp.int32)
        step_in_block = jnp.where(more, state.step_in_block + 1, 0).astype(jnp.int32)
        return state._replace(block=block, step_in_block=step_in_block)

    # --------------------------------------------------------- where sequences lie: see `refill`

    def masked_by_block(self, tokens: Int[Array, "B T"]) -> Bool[Array, "B blocks W"]:
        answer = tokens[:, self.blocks.start :]
        shape = (-1, self.blocks.count, self.blocks.length)
        return transformer.is_masked(self.net.cfg, answer).reshape(shape)

    def masked_share(
        self, masked: Bool[Array, "B blocks W"], block: Int[Array, ""]
    ) -> Float[Array, "B"]:
        """The masked share of each answer, or of what there is of it at this block."""
        if not self.blocks.appended:
            return jnp.mean(masked, axis=(1, 2))
        exists = jnp.arange(self.blocks.count) <= block
        return jnp.mean(masked & exists[:, None], axis=(1, 2)) / jnp.mean(exists)

    def place_of(self, block: Int[Array, ""]) -> Int[Array, ""]:
        """The number of the canvas's block that is block `block` of the loop."""
        return block

    def own_step(self, step: Int[Array, ""]) -> Int[Array, "..."]:
        """The step of every sequence: the same in all, or one for each."""
        return step

    def answer_positions(self, index: Int[Array, "B W"]) -> Int[Array, "B W"]:
        """Canvas positions as positions in each sequence's answer."""
        return index - self.blocks.start

    def fill_after_eos(self, tokens: Int[Array, "B T"]) -> Int[Array, "B T"]:
        return fill_after_eos(self.net.cfg, tokens, self.blocks.start)
