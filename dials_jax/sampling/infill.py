"""Fills the [MASK]s that stand inside sequences; every other token stays.

All masks of a sequence are one block, wherever they stand: a step reveals the most confident of
them all, and each sees what is known on both sides. Blocks from left to right, as in `generate`,
would fix the left ones before the right ones may say anything.

    sequence   The [M] of [M] is Paris .      first: of the first mask of any sequence
    canvas     The | [M] of [M] is Paris .    what `generate` calls prompt | one block
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import jax
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Int

from dials_jax import sharding
from dials_jax.caching.plain import NoCache
from dials_jax.compiling import timed_jit
from dials_jax.config import ModelConfig, typed
from dials_jax.data.tokenizer import Ids
from dials_jax.errors import require
from dials_jax.models.model import Model, check_shapes, check_vocabulary, sequence_keys
from dials_jax.models.padding import aligned
from dials_jax.nn.policy import Policy
from dials_jax.nn.stack import Executor
from dials_jax.sampling.confidence import Confidence
from dials_jax.sampling.dream import Dream
from dials_jax.sampling.generate import (
    STATIC,
    pad_sequences,
    steps_on_canvas,
    with_records,
    without_first,
)
from dials_jax.sampling.generation import Generation, account
from dials_jax.sampling.model_schedule import Schedule
from dials_jax.sampling.requests import ALONE, check_arguments, roles_of
from dials_jax.sampling.sampler import CallRecord


@typed
def infill(
    model: Model,
    sequences: Int[ArrayLike, "B T"] | Sequence[Ids],
    valid: Bool[ArrayLike, "B T"] | None = None,
    *,
    sampler: Confidence | Dream = Confidence(1),
    policy: Policy | None = None,
    key: jax.Array | None = None,
    executor: Executor = "auto",
    fill_to: int = 1,
    log_probs: bool = False,
    trajectory: bool = False,
) -> Generation:
    """Fills every [MASK] of the sequences.

    Args:
      sequences: token ids, as lists of any lengths or as an array, padded on the left.
      sampler: its length becomes that of the part from the first mask on. Steps that were one per
        token become as many as the sequence with most masks has; fewer steps stay.
      policy, key, executor, fill_to, log_probs, trajectory: as in `generate`.

    Returns: what `generate` does; the answer is the part from the first mask of any sequence on.

    Raises: InputError for a sequence without [MASK], and for samplers that fill from left to right
      or look at the canvas's order.
    """
    check_arguments(sampler, NoCache(), fill_to, log_probs, trajectory)
    roles, cfg = roles_of(model, None, policy), model.config
    cfg.require_mask()
    canvas, valid = pad_sequences(sequences, valid, cfg.pad_id, "sequence")
    masked, given = check_masks(cfg, canvas, valid), canvas.shape[1]
    if model.batch_invariant:
        canvas, valid = aligned(canvas, valid, cfg.pad_id)
        masked = np.pad(masked, ((0, 0), (canvas.shape[1] - given, 0)))
    first = int(masked.any(axis=0).argmax())
    sampler = fitted(sampler, canvas.shape[1] - first, int(masked.sum(axis=1).max()))
    present = np.ones(canvas.shape, bool) if valid is None else valid
    sampler.check(cfg, present, policy, None)
    # Padding may be [MASK], too, and that is nothing to fill.
    hidden = ~present & (canvas == cfg.mask_id)
    shown = np.where(hidden, cfg.eos_id, canvas).astype(np.int32)
    batch = (shown, valid, sequence_keys(key, len(canvas)))
    out, seconds = model.run(
        infill_program, *model.place_sequences(batch, fill_to), policy,
        sampler=sampler, cache=NoCache(), executor=executor, first=first,
        log_probs=log_probs, trajectory=trajectory,
    )  # fmt: skip
    turns = Schedule(((ALONE, sampler.count_steps(NoCache())),))
    prompts = canvas[:, :first]
    out = account(*sharding.to_host(out), roles, turns, sampler, NoCache(), prompts, seconds)
    seen = out.trajectory
    if seen is not None:
        seen = seen._replace(tokens=np.where(hidden, cfg.mask_id, seen.tokens))
    out = replace(out, tokens=np.where(hidden, cfg.mask_id, out.tokens), trajectory=seen)
    return without_first(out, canvas.shape[1] - given)


@timed_jit(*STATIC, "first")
def infill_program(
    params, canvas, valid, keys, policy, *, first, log_probs, trajectory, **static
) -> tuple[Int[Array, "B T"], CallRecord]:
    """All steps. Args: first: where the block begins."""
    static["trajectory"] = trajectory
    steps = steps_on_canvas(params, canvas, valid, keys, policy, prompt_length=first, **static)
    state = steps.start(canvas, static["cfg"].num_layers)
    state = steps.run(with_records(state, log_probs=log_probs, trajectory=trajectory))
    return state.tokens, state.record


def check_masks(
    cfg: ModelConfig, canvas: Int[np.ndarray, "B T"], valid: Bool[np.ndarray, "B T"] | None
) -> Bool[np.ndarray, "B T"]:
    """Refuses what cannot be filled; returns where [MASK] is."""
    check_shapes(cfg, canvas.shape, valid, "sequences")
    require(len(canvas) > 0, "there are no sequences; give at least one")
    present = np.ones(canvas.shape, bool) if valid is None else valid
    require(
        not (np.diff(present.astype(int), axis=1) < 0).any(),
        "sequences must be padded on the left: valid goes from True to False",
    )
    check_vocabulary(cfg, canvas, present, "sequence")
    masked = (canvas == cfg.mask_id) & present
    without = np.flatnonzero(~masked.any(axis=1))
    require(
        not without.size,
        f"sequence {without[:1].tolist()} has no [MASK] (id {cfg.mask_id}) to fill; leave it out",
    )
    starts = masked & ~np.roll(present, 1, axis=1) | masked & (np.arange(canvas.shape[1]) == 0)
    begins = np.flatnonzero(starts.any(axis=1))[:1].tolist()
    require(
        not (cfg.right_shift and begins),
        f"sequence {begins} begins with [MASK], but this model predicts a token from the one "
        "before; begin it with a token such as end of text",
    )
    return masked


def fitted(sampler: Confidence | Dream, length: int, most_masks: int) -> Confidence | Dream:
    """The sampler for one block of this length.

    Raises: InputError for settings that have no meaning inside a text.
    """
    require(
        sampler.block_length == sampler.gen_length,
        "masks inside a sequence are one block, the most confident first; leave out block_length",
    )
    for name in (
        "cfg_scale", "stop_at_eos", "delay_eos", "stop_ids", "append_blocks", "end_think_ids",
    ):  # fmt: skip
        require(
            not getattr(sampler, name),
            f"{name} goes by what is prompt and what comes after, and masks inside a sequence have "
            "both on both sides; leave it out",
        )
    one_each = sampler.steps == sampler.gen_length
    steps = most_masks if one_each else min(sampler.steps, most_masks)
    return replace(sampler.with_length(length), steps=steps)
