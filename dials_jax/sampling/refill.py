"""Many prompts through one program: a sequence that has ended makes room for the next prompt.

A batch in which every sequence keeps its place until the last one has ended computes much that
nobody reads. Here the program fills one block of all sequences and returns; those that have ended
leave, and prompts that wait take their places. All sequences of a batch are always at the same
block of the canvas, wherever each of them began: the canvas is a ring.

    clock       0        1        2        3        4        5
    sequence 0  block 0  block 1  block 2  ended
    sequence 3                             block 0  block 1  block 2

    ring        | 2 | 3 | 4 | 5 | 0 | 1 |      the block that is filled, as the clock counts
    sequence 0  | b0| b1| b2|   | p | p |      p: its prompt, left-padded to whole blocks
    sequence 3  | p | b0| b1| b2|   | p |      the same, three blocks further

Attention sees no order but that of the rotary positions, which turn with the ring. So every call is
that of an ordinary batch: no gather per sequence, no copy of a cache. A sequence's tokens, gates
and random numbers are those that it has alone; only sums are rounded in another order.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dials_jax import sharding
from dials_jax.caching.cache import Blocks, Cache, ForwardInputs, ForwardOutputs, Revealed
from dials_jax.caching.canvas import CanvasModel
from dials_jax.caching.plain import DualCache, NoCache
from dials_jax.compiling import timed_jit
from dials_jax.config import ModelConfig
from dials_jax.data.tokenizer import Ids
from dials_jax.errors import require
from dials_jax.models import transformer
from dials_jax.models.model import Model
from dials_jax.models.padding import pad_prompts
from dials_jax.nn.policy import Policy, check_policy
from dials_jax.nn.rope import positions_of
from dials_jax.nn.stack import Executor
from dials_jax.sampling.costs import Calls, Part
from dials_jax.sampling.end_of_text import fill_after_eos
from dials_jax.sampling.generation import Generation, count_tokens
from dials_jax.sampling.loop import BlockSampler, Loop, LoopState, step_limit, variant_work
from dials_jax.sampling.requests import check_batch
from dials_jax.sampling.reveal import StepInfo
from dials_jax.sampling.sampler import CallRecord, Sampler, keep_log_probs, start_record


class Ring(NamedTuple):
    """A batch between two blocks.

    Attributes:
      state: of the loop. Its `block` is the clock: blocks that the batch has filled.
      valid: of the prompts; False at padding.
      keys: one per sequence.
      entered: the clock when each sequence entered.
    """

    state: LoopState
    valid: Bool[Array, "B P"]
    keys: jax.Array
    entered: Int[Array, "B"]


class Arrivals(NamedTuple):
    """Prompts that enter: one for every place of the batch, of which only some are new."""

    enters: Bool[Array, "B"]
    prompts: Int[Array, "B P"]
    valid: Bool[Array, "B P"]
    keys: jax.Array


class RingLoop(Loop):
    """The loop of an ordinary batch, of which sequence b began `entered[b]` blocks later."""

    def __init__(
        self, sampler: BlockSampler, cache: Cache, net: CanvasModel, ring: Ring, noise_keys
    ):
        super().__init__(sampler, cache, net, ring.valid.shape[1], noise_keys)
        self.entered, self.prompt_length = ring.entered, ring.valid.shape[1]
        self.blocks = ring_blocks(sampler, net.cfg, net.length)
        self.variants = cache.forward_variants(net, self.blocks)

    def empty_record(self, log_probs: Float[Array, "B T"] | None = None) -> CallRecord:
        """Room for the calls of one block. Args: log_probs: of the canvas so far, if kept."""
        record = start_record(self.limit, self.net.cfg.num_layers, self.net.num_sequences)
        return record._replace(log_probs=log_probs)

    def run_block(self, state: LoopState) -> LoopState:
        """Takes the steps of one block."""
        stop = (state.block + 1) * self.limit
        return self.run_until(state, stop)

    def next_step(self, state: LoopState) -> LoopState:
        more = (state.step_in_block + 1 < self.limit) & jnp.any(self.is_unfinished(state))
        step = jnp.where(more, state.step_in_block + 1, 0).astype(jnp.int32)
        block = jnp.where(more, state.block, state.block + 1).astype(jnp.int32)
        return state._replace(block=block, step_in_block=step)

    def reveal(
        self, out: ForwardOutputs, inputs: ForwardInputs, info: StepInfo, with_log_probs: bool
    ) -> tuple[Int[Array, "B T"], Revealed]:
        # A shifted model predicts the token behind a block's last position, which may be the first.
        out = out._replace(index=out.index % self.net.length)
        return super().reveal(out, inputs, info, with_log_probs)

    # ----------------------------------------------------------------- where sequences lie

    def masked_by_block(self, tokens: Int[Array, "B T"]) -> Bool[Array, "B blocks W"]:
        turned = jnp.roll(tokens, -self.blocks.start, axis=1)
        shape = (-1, self.blocks.count, self.blocks.length)
        return transformer.is_masked(self.net.cfg, turned).reshape(shape)

    def masked_share(
        self, masked: Bool[Array, "B blocks W"], block: Int[Array, ""]
    ) -> Float[Array, "B"]:
        return jnp.sum(masked, axis=(1, 2)) / self.sampler.gen_length

    def place_of(self, block: Int[Array, ""]) -> Int[Array, ""]:
        return (self.prompt_length // self.blocks.length + block) % self.blocks.count

    def own_step(self, step: Int[Array, ""]) -> Int[Array, "B"]:
        return step - self.entered * self.limit

    def answer_positions(self, index: Int[Array, "B W"]) -> Int[Array, "B W"]:
        first = first_positions(self.entered, self.blocks)[:, None]
        return (index - first) % self.net.length - self.prompt_length

    def fill_after_eos(self, tokens: Int[Array, "B T"]) -> Int[Array, "B T"]:
        first = first_positions(self.entered, self.blocks)
        filled = fill_after_eos(self.net.cfg, turn(tokens, -first), self.prompt_length)
        return turn(filled, first)


def ring_blocks(sampler: BlockSampler, cfg: ModelConfig, length: int) -> Blocks:
    """The whole canvas as blocks. Those of positions that predict a block never cross its end."""
    width = sampler.block_length
    return Blocks(int(cfg.right_shift), width, length // width, sampler.max_quota)


def first_positions(entered: Int[Array, "B"], blocks: Blocks) -> Int[Array, "B"]:
    """Where each sequence's first token lies on the ring."""
    return (blocks.start + entered * blocks.length) % (blocks.count * blocks.length)


def turn(canvas: Array, by: Int[Array, "B"]) -> Array:
    """Each sequence [T, ...] moved to the right by its own number of positions, around the ring."""
    return jax.vmap(lambda x, n: jnp.roll(x, n, axis=0))(canvas, by)


# ------------------------------------------------------------------------------------ the programs


def _loop(params, ring: Ring, policy, *, cfg, sampler, cache, executor) -> RingLoop:
    noise_keys, gate_keys, _ = jax.vmap(lambda k: jax.random.split(k, 3))(ring.keys).T
    answer = jnp.ones((len(ring.valid), sampler.gen_length), bool)
    valid = jnp.concatenate([ring.valid, answer], axis=1)
    blocks = ring_blocks(sampler, cfg, valid.shape[1])
    first = first_positions(ring.entered, blocks)
    positions = turn(positions_of(valid), first)
    inputs = transformer.block_inputs(cfg, turn(valid, first), valid.shape, positions)
    net = CanvasModel(cfg, params, policy, executor, inputs, gate_keys, None, 0)
    return RingLoop(sampler, cache, net, ring, noise_keys)


def _admit(ring: Ring, arrivals: Arrivals, cfg: ModelConfig, sampler: BlockSampler) -> Ring:
    """The batch with the prompts that enter now in their places."""
    new, clock = arrivals.enters, ring.state.block
    answer = jnp.full((len(new), sampler.gen_length), sampler.blank_id(cfg), arrivals.prompts.dtype)
    canvas = jnp.concatenate([arrivals.prompts, answer], axis=1)
    entered = jnp.where(new, clock, ring.entered)
    blocks = ring_blocks(sampler, cfg, canvas.shape[1])
    canvas = turn(canvas, first_positions(entered, blocks))
    tokens = jnp.where(new[:, None], canvas, ring.state.tokens)
    valid = jnp.where(new[:, None], arrivals.valid, ring.valid)
    keys = jnp.where(new, arrivals.keys, ring.keys)
    record = ring.state.record
    if record.log_probs is not None:
        log_probs = jnp.where(new[:, None], jnp.nan, record.log_probs)
        record = record._replace(log_probs=log_probs)
    return Ring(ring.state._replace(tokens=tokens, record=record), valid, keys, entered)


@timed_jit("cfg", "sampler", "cache", "executor", "log_probs")
def empty_ring_program(
    params, arrivals: Arrivals, *, cfg, sampler, cache, executor, log_probs
) -> Ring:
    """A batch whose places hold no sequence: no token is masked."""
    batch, prompt_length = arrivals.prompts.shape
    tokens = jnp.full((batch, prompt_length + sampler.gen_length), cfg.pad_id, jnp.int32)
    tokens, zero, valid = map(
        sharding.constrain_batch,
        (tokens, jnp.zeros(batch, jnp.int32), jnp.ones_like(arrivals.valid)),
    )
    ring = Ring(None, valid, arrivals.keys, zero)
    static = {"cfg": cfg, "sampler": sampler, "cache": cache, "executor": executor}
    loop = _loop(params, ring, None, **static)
    state = loop.start(tokens, cfg.num_layers)
    state = state._replace(record=loop.empty_record())
    return ring._replace(state=keep_log_probs(state) if log_probs else state)


@timed_jit("cfg", "sampler", "cache", "executor", "placement", donate=("ring",))
def block_program(
    params, arrivals: Arrivals, policy, *, ring: Ring, placement, cfg, sampler, cache, executor
) -> tuple[Ring, CallRecord, Int[Array, "B G"]]:
    """Admits prompts and fills one block; the calls that it made, and every answer so far.

    The record's log-probabilities are those of the answers, [B, G].
    """
    ring = _admit(ring, arrivals, cfg, sampler)
    loop = _loop(params, ring, policy, cfg=cfg, sampler=sampler, cache=cache, executor=executor)
    empty = loop.empty_record(ring.state.record.log_probs)
    state = loop.run_block(ring.state._replace(record=empty))
    first, record = first_positions(ring.entered, loop.blocks), state.record
    answers = turn(state.tokens, -first)[:, loop.prompt_length :]
    if record.log_probs is not None:
        own = turn(record.log_probs, -first)[:, loop.prompt_length :]
        record = record._replace(log_probs=own)
    return sharding.keep_placed(ring._replace(state=state), placement), record, answers


# ---------------------------------------------------------------------------------------- the queue


class Finished(NamedTuple):
    """One prompt's generation, as soon as it has ended; `out` has this one sequence."""

    request: int
    out: Generation


class _Occupant:
    """A sequence in a place of the batch, and its calls so far."""

    def __init__(self, request: int, first_step: int):
        self.request, self.first_step = request, first_step
        self.num_blocks, self.seconds = 0, 0.0
        self.calls: list[tuple[np.ndarray, ...]] = []  # gates, masked share, own, variant, step

    def add(self, record: CallRecord, place: int, seconds: float) -> None:
        """Adds the calls of a block; the seconds are the sequence's share."""
        nfe, one = int(record.nfe), slice(place, place + 1)
        steps = record.step[:nfe] - self.first_step
        self.calls.append(
            (
                record.gates[:nfe, :, one],
                record.masked_share[:nfe, one],
                record.own[:nfe, one],
                record.variant[:nfe],
                steps,
            )
        )
        self.num_blocks, self.seconds = self.num_blocks + 1, self.seconds + seconds


def may_end_early(sampler: Sampler, is_done: bool = False) -> bool:
    """Whether a sequence may end before its last block: by the sampler, or by the caller."""
    return is_done or getattr(sampler, "stop_at_eos", False)


OWN_LOOP = ("make_steps", "blocks")  # methods of `BlockSampler` that `RingLoop` knows no others of


def why_not_refilled(
    sampler: Sampler, cache: Cache | None, cfg: ModelConfig, batch_invariant: bool = False
) -> str | None:
    """Why sequences cannot make room for others under these settings; None: they can."""
    if batch_invariant:
        return "on a ring a sequence's keys are summed in an order that depends on when it entered"
    if cfg.block_length is not None:
        return "a block-causal model counts its blocks from each prompt's first token"
    if not isinstance(sampler, BlockSampler):  # `RingLoop` runs its two methods
        return f"{type(sampler).__name__} does not fill blocks"
    if any(getattr(type(sampler), x) is not getattr(BlockSampler, x) for x in OWN_LOOP):
        return f"{type(sampler).__name__} has a loop of its own"
    if not isinstance(cache or NoCache(), NoCache | DualCache):
        return f"{type(cache).__name__} counts positions from the canvas's end; use DualCache"
    if sampler.cfg_scale > 0 or sampler.delay_eos:
        return "guidance and delay_eos look at the canvas's order; set cfg_scale=0, delay_eos=False"
    if sampler.append_blocks or sampler.stop_ids or sampler.end_think_ids:
        return "append_blocks, stop_ids and end_think_ids need the canvas in order; leave them out"
    if cfg.causal or cfg.rope_theta is None:
        return "the model sees the canvas's order otherwise than by rotary positions"
    return None


def generate_refilled(
    model: Model,
    prompts: Sequence[Ids],
    *,
    sampler: Sampler,
    policy: Policy | None = None,
    cache: Cache | None = None,
    keys: jax.Array,
    batch_size: int,
    length: int,
    executor: Executor = "auto",
    is_done: Callable[[int, Int[np.ndarray, "G"]], bool] | None = None,
    log_probs: bool = False,
) -> Iterator[Finished]:
    """Generates after every prompt; yields each as it ends.

    Args:
      prompts: tokens of each.
      keys: one per prompt.
      batch_size: sequences at a time; rounded up to what the mesh divides.
      length: that prompts are padded to; rounded up to whole blocks.
      is_done: `is_done(request, answer)` ends a sequence at a block's end, as a stop string does;
        the answer has [MASK] where nothing is revealed. None: they end by themselves.
      log_probs: keep those of the tokens: `Generation.log_probs`.

    Raises: InputError for what `generate` refuses, and for what cannot be refilled.
    """
    cfg, cache = model.config, cache or NoCache()
    why = why_not_refilled(sampler, cache, cfg, model.batch_invariant)
    require(why is None, f"sequences cannot make room for others: {why}")
    tokens, valid = pad_prompts(prompts, max(map(len, prompts)), cfg.pad_id)
    check_policy(policy)
    check_batch(cfg, tokens, valid, sampler, cache, policy)
    length = -(-length // sampler.block_length) * sampler.block_length
    tokens, valid = pad_prompts(prompts, length, cfg.pad_id)
    batch_size += -batch_size % sharding.num_batch_shards(model.mesh)
    static = {"sampler": sampler, "cache": cache, "executor": executor}
    total = length + sampler.gen_length
    work = variant_work(cfg, cache, ring_blocks(sampler, cfg, total), total, 0)
    part = Part(cfg, policy, work)

    def place(enters: Bool[np.ndarray, "B"], source: Int[np.ndarray, "B"]) -> Arrivals:
        return model.place_sequences(Arrivals(enters, tokens[source], valid[source], keys[source]))

    nobody = place(np.zeros(batch_size, bool), np.zeros(batch_size, int))
    ring, _ = model.run(empty_ring_program, nobody, log_probs=log_probs, **static)
    where = jax.tree.map(lambda x: x.sharding, ring)
    static["placement"] = sharding.placement_of(ring)
    waiting, places = deque(range(len(prompts))), [None] * batch_size
    limit, clock = step_limit(sampler, cache), 0
    while waiting or any(places):
        enters, source = np.zeros(batch_size, bool), np.zeros(batch_size, int)
        for i in range(batch_size):
            if places[i] is None and waiting:
                enters[i], source[i] = True, waiting.popleft()
                places[i] = _Occupant(int(source[i]), clock * limit)
        arrivals = place(enters, source) if enters.any() else nobody
        (ring, *made), seconds = model.run(block_program, arrivals, policy, ring=ring, **static)
        ring = jax.device_put(ring, where)  # JAX may name the same place otherwise; nothing moves
        record, answers = sharding.to_host(made)
        clock += 1
        occupied = [(i, one) for i, one in enumerate(places) if one]
        for i, one in occupied:
            one.add(record, i, seconds / len(occupied))
            ended = one.num_blocks == sampler.gen_length // sampler.block_length
            ended = ended or not (answers[i] == cfg.mask_id).any()
            if ended or (is_done is not None and is_done(one.request, answers[i])):
                places[i] = None
                canvas = np.concatenate([tokens[one.request], answers[i]])
                filled = one.num_blocks * sampler.block_length
                out = _generation(one, canvas, length, filled, part)
                if log_probs:
                    out = dataclasses.replace(out, log_probs=record.log_probs[i : i + 1])
                yield Finished(one.request, out)


def _generation(
    one: _Occupant, canvas: Int[np.ndarray, "T"], length: int, filled: int, part: Part
) -> Generation:
    """The record of one sequence, whose prompt takes `length`, and its filled blocks the next
    `filled` positions; its seconds are its share."""
    gates, share, own, variant, steps = (np.concatenate(x) for x in zip(*one.calls, strict=True))
    nfe = len(variant)
    calls = Calls([part], np.zeros(nfe, int), gates, own, variant, len(canvas))
    return Generation(
        tokens=canvas[None],
        nfe=nfe,
        gates=gates,
        masked_share=share,
        own=own,
        num_tokens=count_tokens(part.cfg, canvas[None, length : length + filled]),
        tokens_run=part.tokens(variant),
        steps=steps,
        flops=calls.total(one.seconds),
    )
