"""What every model call did to the canvases, kept on the device as the other records are.

It is there only where it was asked for: without it, compiled programs are what they were.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from dials_jax.sampling.sampler import CallRecord, keep_log_probs
from dials_jax.sharding import constrain_batch


class CanvasRecord(NamedTuple):
    """The canvases after every call. S is the most calls there could be."""

    tokens: Int[Array, "S B T"]
    log_probs: Float[Array, "S B T"]  # see `keep_log_probs`
    depth: Int[Array, "S B T"]  # see `CanvasModel.depth`; of the conditional half under guidance


class Trajectory(NamedTuple):
    """How sequences came about: `Generation.trajectory`.

    Attributes:
      tokens: the whole canvas after each call.
      log_probs: in nats, of the tokens on it under the model at the call that wrote them; NaN where
        no call has.
      depth: that each position reached in each call: it left after so many layers, in which it was
        computed wherever the layer's gate was open. 0 outside the call's window. Only ES-dLLM lets
        positions leave before the last layer. Under guidance, of the conditional half.
      flops: of each call on each sequence, of both halves under guidance.
      full_flops: of a call on a sequence that runs the whole canvas through all layers of the
        largest model.
    """

    tokens: Int[np.ndarray, "S B T"]
    log_probs: Float[np.ndarray, "S B T"]
    depth: Int[np.ndarray, "S B T"]
    flops: Float[np.ndarray, "S B"]
    full_flops: float


def keep_trajectory(state: PyTree) -> PyTree:
    """The state before the first step, whose record also holds what every call does."""
    state = keep_log_probs(state)
    record, tokens = state.record, state.tokens
    shape = (len(record.variant), *tokens.shape)
    empty = CanvasRecord(
        jnp.zeros(shape, tokens.dtype),
        jnp.full(shape, jnp.nan, jnp.float32),
        jnp.zeros(shape, jnp.int32),
    )
    canvases = CanvasRecord(*(constrain_batch(x, axis=1) for x in empty))
    return state._replace(record=record._replace(canvases=canvases))


def append_canvas(
    record: CallRecord,
    tokens: Int[Array, "B T"],
    depth: Int[Array, "R T"] | None,
    call: Int[Array, ""] | None = None,
) -> CallRecord:
    """The record with the canvas after a call; the same record where none is kept.

    Args:
      depth: of the call: see `CanvasModel.depth`.
      call: its number; None: the last one.
    """
    if record.canvases is None:
        return record
    at = record.nfe - 1 if call is None else call
    new = CanvasRecord(tokens, record.log_probs, depth[: len(tokens)])
    canvases = CanvasRecord(*(x.at[at].set(y) for x, y in zip(record.canvases, new, strict=True)))
    return record._replace(canvases=canvases)
