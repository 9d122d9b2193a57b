"""`generate`: continues prompts; nothing returns to the host before the end.

One model makes all of its steps in one program, or in several that take turns: where a cache has
several forward variants and all steps are known, each part of the steps is a program
(`timetable.py`), and all are compiled at the same time. Under a schedule every model has one
program for all the steps that it may take: it gets the state and the step at which the next model
continues. The state stays on the device.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Int, PyTree, Shaped

from dials_jax import sharding
from dials_jax.caching.cache import Cache
from dials_jax.caching.canvas import CanvasModel
from dials_jax.caching.plain import NoCache
from dials_jax.compiling import timed_jit
from dials_jax.config import typed
from dials_jax.data.tokenizer import Ids
from dials_jax.diffusion.guidance import repeat_batch
from dials_jax.errors import require
from dials_jax.models import transformer
from dials_jax.models.model import Model, as_ids, as_valid, sequence_keys
from dials_jax.models.padding import aligned, differ_in_length, pad_prompts
from dials_jax.nn.policy import Policy
from dials_jax.nn.stack import Executor
from dials_jax.sampling.generation import Generation, account
from dials_jax.sampling.model_schedule import Schedule
from dials_jax.sampling.requests import (
    ALONE,
    Role,
    check_arguments,
    check_batch,
    check_observer,
    check_schedule,
    empty_prompts,
    roles_of,
)
from dials_jax.sampling.sampler import CallRecord, Sampler, Steps, keep_log_probs
from dials_jax.sampling.timetable import Loops
from dials_jax.sampling.trajectory import keep_trajectory
from dials_jax.skipping.observing import BatchObserver, Observer


@typed
def generate(
    model: Model | Mapping[str, Model],
    prompts: Int[ArrayLike, "B P"] | Sequence[Ids] | None = None,
    valid: Bool[ArrayLike, "B P"] | None = None,
    *,
    sampler: Sampler,
    schedule: Schedule | None = None,
    policy: Policy | Mapping[str, Policy | None] | None = None,
    cache: Cache | None = None,
    key: jax.Array | None = None,
    num_sequences: int | None = None,
    executor: Executor = "auto",
    fill_to: int = 1,
    log_probs: bool = False,
    trajectory: bool = False,
    observer: Observer | None = None,
) -> Generation:
    """Generates `sampler.gen_length` tokens after every prompt.

    Args:
      model: one, or those that a schedule names, by letter.
      prompts: token ids, as lists of any lengths or as an array, padded on the left. None: no
        prompts, for `num_sequences` sequences.
      valid: False at the padding of an array; None means that there is none, and is faster.
      schedule: which model takes which steps; see `Schedule`.
      policy: which layers run at which step; None runs all. A mapping gives models their own.
      cache: what a step runs; None runs the whole canvas. A layer that a policy skips leaves its
        keys and values in the cache as they were.
      key: one key (folded with the sequence's number), or one per sequence, so that its random
        numbers do not depend on its batch. None is the key of seed 0.
      fill_to: run the program of this batch size, rounded up to what the mesh divides, or of a
        multiple, also for fewer sequences.
      log_probs: keep those of the generated tokens.
      trajectory: keep the canvas after every call, how deep each position went in it and what it
        cost, and `log_probs`.
      observer: measures the hidden states of every model call. Of one model, without a cache and
        without guidance: each call then sees every canvas once, and the whole of it.

    Raises: InputError for prompts with [MASK], padding that is not on the
      left, an empty prompt where logits are shifted, more tokens than the model has positions
      for, or settings that do not compose.
    """
    cache_given, cache = cache, NoCache() if cache is None else cache
    check_arguments(sampler, cache, fill_to, log_probs, trajectory)
    roles = roles_of(model, schedule, policy)
    prompts = empty_prompts(num_sequences) if prompts is None else prompts
    pad_id = next(iter(roles.values())).model.config.pad_id
    prompts, valid = pad_sequences(prompts, valid, pad_id, "prompt")
    require(prompts.ndim == 2, f"prompts have shape {prompts.shape}; give [batch, length]")
    given = prompts.shape[1]
    require(
        num_sequences in (None, len(prompts)),
        f"num_sequences={num_sequences} and {len(prompts)} prompts; num_sequences is for "
        "generating without prompts",
    )
    for role in roles.values():
        check_batch(role.model.config, prompts, valid, sampler, cache_given, role.policy)
    turns = schedule or Schedule(((ALONE, sampler.count_steps(cache)),))
    if schedule:
        check_schedule(roles, turns, sampler, cache)
    first, num_sequences = next(iter(roles.values())), len(prompts)
    if first.model.batch_invariant and not hasattr(sampler, "lay_out"):
        prompts, valid = aligned(prompts, valid, pad_id)
    batch = (prompts.astype(np.int32), valid, sequence_keys(key, num_sequences))
    batch = first.model.place_sequences(batch, fill_to)
    static = {"sampler": sampler, "cache": cache, "executor": executor}
    static |= {"log_probs": log_probs, "trajectory": trajectory}
    if observer is not None:
        check_observer(observer, roles, sampler, cache)
        # The last sequence is repeated until the batch is full, and counts once.
        counted = np.arange(len(batch[0])) < num_sequences
        counted = sharding.place_sequences(counted, first.model.mesh)
        static |= {"observer": observer, "counted": counted}
    parts = () if schedule else parts_of(first, sampler, cache, prompts.shape[1])
    if parts:
        out, seconds = run_in_turns(roles, [Turn(ALONE, part=x) for x in parts], batch, **static)
    elif schedule or not sampler.one_program:
        out, seconds = run_schedule(roles, turns, batch, **static)
    else:
        out, seconds = run_alone(first, batch, **static)
    found = account(*sharding.to_host(out), roles, turns, sampler, cache, prompts, seconds)
    return without_first(found, prompts.shape[1] - given)


def without_first(out: Generation, extra: int) -> Generation:
    """Without the first tokens, which are padding that was added to all sequences."""
    if not extra:
        return out
    trajectory = out.trajectory
    if trajectory is not None:
        tokens, log_probs, depth = (x[..., extra:] for x in trajectory[:3])
        trajectory = trajectory._replace(tokens=tokens, log_probs=log_probs, depth=depth)
    return replace(out, tokens=out.tokens[:, extra:], trajectory=trajectory)


def parts_of(role: Role, sampler: Sampler, cache: Cache, prompt_length: int) -> list[Loops]:
    """The parts of a generation that are worth a program each: of two kinds or more."""
    divide = getattr(sampler, "parts", None)
    parts = divide(role.model.config, cache, prompt_length) if divide else []
    return parts if len(set(parts)) > 1 else []


def pad_sequences(
    sequences: Any, valid: Any, pad_id: int, what: str
) -> tuple[Int[np.ndarray, "..."], Bool[np.ndarray, "..."] | None]:
    """Sequences that a user gave, and where they are real, as arrays; lists of several lengths are
    padded on the left.

    Args:
      what: the name of a sequence in messages.

    Raises: InputError for an empty list, sequences that are no token ids, and arrays of several
      lengths.
    """
    empty = isinstance(sequences, list | tuple) and not sequences
    require(not empty, f"there are no {what}s; give at least one")
    if valid is None and differ_in_length(sequences):
        rows = [as_ids([ids], what)[0] for ids in sequences]
        return pad_prompts(rows, max(map(len, rows)), pad_id)
    return as_ids(sequences, what), None if valid is None else np.asarray(as_valid(valid))


# ---------------------------------------------------------------------------- compiled programs

STATIC = ("cfg", "sampler", "cache", "executor", "log_probs", "trajectory", "observer")
Generated = tuple[tuple[Int[Array, "B T"], CallRecord], float]  # canvas, record, and seconds


def lay_out_canvas(
    params, prompts, valid, keys, policy, *, cfg, sampler, cache, executor, log_probs=False,
    trajectory=False, observer=None, counted=None,
) -> tuple[Int[Array, "B T"], Steps]:  # fmt: skip
    """Prompts, then blanks, and the steps of a model on them.

    Args:
      counted: [B], False at sequences that the observer leaves out.
    """
    if hasattr(sampler, "lay_out"):
        canvas, valid, length = sampler.lay_out(cfg, prompts, valid)
    else:
        answer = jnp.full((len(prompts), sampler.gen_length), sampler.blank_id(cfg), prompts.dtype)
        canvas, length = jnp.concatenate([prompts, answer], axis=1), prompts.shape[1]
        if valid is not None:
            valid = jnp.concatenate([valid, jnp.ones_like(answer, bool)], axis=1)
    static = {"cfg": cfg, "sampler": sampler, "cache": cache, "executor": executor}
    static["trajectory"] = trajectory
    if observer is not None:
        present = jnp.broadcast_to(counted[:, None], canvas.shape)
        present = present if valid is None else present & valid
        steps = sampler.count_steps(cache)
        static["observer"] = BatchObserver(observer, steps, length, present)
    return canvas, steps_on_canvas(
        params, canvas, valid, keys, policy, prompt_length=length, **static
    )


def steps_on_canvas(
    params, canvas, valid, keys, policy, *, prompt_length, cfg, sampler, cache, executor,
    trajectory=False, observer=None,
) -> Steps:  # fmt: skip
    """The steps of a model on a canvas; three keys from each sequence's one.

    Under guidance the model sees every canvas twice, each time with other random gates.
    """
    noise_keys, gate_keys, uncond_gate_keys = jax.vmap(lambda k: jax.random.split(k, 3))(keys).T
    length, prompt_mask = prompt_length, None
    if sampler.cfg_scale > 0:
        prompt_mask = jnp.broadcast_to(jnp.arange(canvas.shape[1]) < length, canvas.shape)
        gate_keys = jnp.concatenate([gate_keys, uncond_gate_keys])
        valid = repeat_batch(valid)
    block_inputs = transformer.block_inputs(cfg, valid, (len(gate_keys), canvas.shape[1]))
    never_masked = length if prompt_mask is None else 0
    net = CanvasModel(
        cfg, params, policy, executor, block_inputs, gate_keys, prompt_mask, never_masked, observer,
        keeps_depth=trajectory,
    )  # fmt: skip
    return sampler.make_steps(net, length, noise_keys, cache)


@timed_jit(*STATIC)
def generate_program(
    params, prompts, valid, keys, policy, **static
) -> tuple[Int[Array, "B T"], CallRecord]:
    """All steps by one model."""
    canvas, steps = lay_out_canvas(params, prompts, valid, keys, policy, **static)
    state = with_records(steps.start(canvas, static["cfg"].num_layers), **static)
    return read_canvas(static["sampler"], steps.run(state), prompts, valid)


def read_canvas(sampler, state, prompts, valid) -> tuple[Int[Array, "B T"], CallRecord]:
    """Prompts and answers, and the record, where a sampler arranges canvases otherwise."""
    tokens, record = state.tokens, without_states(state.record)
    if not hasattr(sampler, "lay_out"):
        return tokens, record

    def as_given(x: Shaped[Array, "B T"]) -> Shaped[Array, "B _"]:
        return sampler.lay_back(x, prompts, valid)

    tokens = as_given(tokens).at[:, : prompts.shape[1]].set(prompts)
    log_probs, canvases = record.log_probs, jax.tree.map(jax.vmap(as_given), record.canvases)
    log_probs = None if log_probs is None else as_given(log_probs)
    return tokens, record._replace(log_probs=log_probs, canvases=canvases)


@timed_jit(*STATIC, "num_layers")
def start_program(params, prompts, valid, keys, *, num_layers, **static) -> PyTree:
    """The state before the first step. Args: num_layers: of the deepest model."""
    canvas, steps = lay_out_canvas(params, prompts, valid, keys, None, **static)
    return with_records(steps.start(canvas, num_layers), **static)


@timed_jit(*STATIC, "placement", "part", donate=("state",))
def segment_program(
    params, state, stop, prompts, valid, keys, policy, *, placement, part=None, **static
) -> PyTree:
    """The steps of one model up to number `stop`, or those of a part.

    Args:
      placement: of the state, which the next program takes: see `sharding.keep_placed`.
    """
    _, steps = lay_out_canvas(params, prompts, valid, keys, policy, **static)
    state = steps.run(state, stop) if part is None else steps.run_part(part, state)
    return sharding.keep_placed(state, placement)


def with_records(state: PyTree, *, log_probs=False, trajectory=False, **_) -> PyTree:
    """The state before the first step, with the records that were asked for."""
    if trajectory:
        return keep_trajectory(state)
    return keep_log_probs(state) if log_probs else state


def without_states(record: CallRecord) -> CallRecord:
    """The record without the hidden states that were kept for the next call."""
    if record.observed is None:
        return record
    return record._replace(observed=record.observed._replace(previous=None))


def run_alone(role: Role, batch: tuple, **static) -> Generated:
    """Runs one model's steps as one program. Args: batch: prompts, valid and keys, placed."""
    return role.model.run(generate_program, *batch, role.policy, **static)


class Turn(NamedTuple):
    """Steps of one model that a program makes: those before number `stop`, or those of a part."""

    letter: str
    stop: np.int32 | None = None
    part: Loops | None = None


def run_schedule(roles: dict[str, Role], schedule: Schedule, batch: tuple, **static) -> Generated:
    """Runs the models of a schedule in turns. Args: batch: as in `run_in_turns`."""
    turns = [Turn(letter, np.int32(stop)) for letter, stop in schedule.ends()]
    return run_in_turns(roles, turns, batch, **static)


def run_in_turns(
    roles: dict[str, Role], turns: Sequence[Turn], batch: tuple, **static
) -> Generated:
    """Runs several programs, one after the other; each is compiled before the first one runs.

    Args:
      batch: prompts, valid and keys, placed on the models' mesh.
    """
    acting = {turn.letter: roles[turn.letter] for turn in turns}
    num_layers = max(role.model.num_layers for role in acting.values())
    first = acting[turns[0].letter].model
    state, seconds = first.run(start_program, *batch, **static, num_layers=num_layers)
    static["placement"] = sharding.placement_of(state)

    def arguments(turn: Turn, state: PyTree) -> tuple:
        model, policy = acting[turn.letter]
        return model.inference_params, state, turn.stop, *batch, policy

    kinds = {(turn.letter, turn.part): turn for turn in turns}
    with first.context():
        compiled = segment_program.programs([
            (arguments(turn, state), {**static, "cfg": acting[letter].model.config, "part": part})
            for (letter, part), turn in kinds.items()
        ])  # fmt: skip
    programs = dict(zip(kinds, compiled, strict=True))
    counted = {name: x for name, x in static.items() if name == "counted"}
    jax.block_until_ready([(role.model.inference_params, role.policy) for role in acting.values()])
    start = time.perf_counter()
    for turn in turns:
        state = programs[turn.letter, turn.part](*arguments(turn, state), **counted)
    jax.block_until_ready(state)
    out = state.tokens, without_states(state.record)
    return out, seconds + time.perf_counter() - start
