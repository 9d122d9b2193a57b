"""Runs the layers of a transformer, each row through those that its gate opens.

The stack knows gates, not routers: a `Policy` turns hidden states into a gate a row, and one of
three executors carries the gates out, with equal results.

- `select`: every layer computed, rows chosen afterwards. Training, and the reference.
- `cond`: one `lax.cond` a layer, for a decision that all rows share.
- `compact`: decisions a row. Rows that execute move to the front and the block runs on that slice
  only, so that time follows the executed share at any batch size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, PyTree

from dials_jax import trees
from dials_jax.sharding import BATCH_AXES, constrain_rows, num_batch_shards

Executor = Literal["auto", "select", "cond", "compact"]
Gate = np.bool_ | Bool[Array, ""] | Bool[Array, "B"] | Float[Array, "B"]
BlockFn = Callable[[trees.Params, Array, PyTree], Array]

# `compact` compiles one branch a slice size. Eight a device keep programs small; above eight rows
# a slice is rounded up to a multiple of B/8, at most 1/8 of a layer's work.
MAX_BRANCHES = 8


class Denoising(NamedTuple):
    """What a policy may know about a batch beside its hidden states."""

    masked: Bool[Array, "B T"]  # [MASK] now, and not padding
    step: Int[Array, ""]  # denoising step, from 0
    row_keys: PyTree  # one random key a row


@runtime_checkable
class Policy(Protocol):
    """Decides which rows run a layer."""

    def plan(self, num_layers: int, denoising: Denoising) -> PyTree:
        """All that is known before the first layer; leaves lead with the axis of layers."""

    def gate(self, plan: PyTree, h: Float[Array, "B T D"], denoising: Denoising) -> Gate:
        """Whether to run a layer, from its slice of the plan. One boolean, or one a row.

        A NumPy boolean is known while tracing and leaves no branch in the program.

        A float gate is 0 or 1 with a straight-through gradient; only `select` takes it.
        """


class StackOutput(NamedTuple):
    """`h` after the last layer; `gates` [L, B]; what `observe` returned, a leading axis a layer."""

    h: Float[Array, "B T D"]
    gates: Array
    observed: PyTree


def run_stack(
    block: BlockFn,
    layers: trees.Params,
    h: Float[Array, "B T D"],
    context: PyTree,
    policy: Policy | None,
    denoising: Denoising,
    *,
    executor: Executor = "auto",
    observe: Callable[[Array, Array], PyTree] | None = None,
) -> StackOutput:
    """Runs `layers`, stacked (a scan) or unrolled (a Python loop, no weight copies).

    Args:
      block: `block(params, h, context)`.
      context: rows of whatever the block needs beside h; every leaf leads with the batch.
      observe: called with each layer's input and output.

    Raises: ValueError for decisions a row under `cond`.
    """

    def run_layer(h, layer):
        params, plan = layer
        gate = np.True_ if policy is None else policy.gate(plan, h, denoising)
        new = constrain_rows(_execute(block, params, h, context, gate, executor))
        seen = observe(h, new) if observe else None
        return new, (jnp.broadcast_to(gate, h.shape[:1]), seen)

    count = trees.num_layers(layers)
    plan = policy.plan(count, denoising) if policy else None
    h = constrain_rows(h)
    if not trees.is_unrolled(layers):
        h, (gates, observed) = lax.scan(run_layer, h, (layers, plan))
        return StackOutput(h, gates, observed)
    outputs = []
    for i, params in enumerate(layers):
        h, output = run_layer(h, (params, trees.layer_slice(plan, i)))
        outputs.append(output)
    gates, observed = jax.tree.map(lambda *x: jnp.stack(x), *outputs)
    return StackOutput(h, gates, observed)


def _execute(
    block: BlockFn, params: Any, h: Array, context: PyTree, gate: Any, executor: Executor
) -> Array:
    """One layer, by the executor that fits its gate."""
    if isinstance(gate, np.bool_):  # known while tracing: no branch in the program
        return block(params, h, context) if gate else h
    per_row = gate.ndim == 1
    if executor == "auto":
        executor = "compact" if per_row and h.shape[0] > 1 else "cond"
    if jnp.issubdtype(gate.dtype, jnp.floating) and executor != "select":
        raise ValueError(f"executor={executor!r} drops a float gate's gradient; use 'select'")
    if executor == "select":
        return choose(gate, h, block(params, h, context))
    if executor == "compact" and per_row:
        return _compact(block, params, h, context, gate)
    if per_row and h.shape[0] > 1:
        raise ValueError("executor='cond' needs one decision for all rows; use 'compact'")
    on = gate[0] if per_row else gate
    return lax.cond(on, lambda: block(params, h, context), lambda: h)


def choose(gate: Gate, h: Float[Array, "B T D"], new: Float[Array, "B T D"]) -> Array:
    """The new rows where the gate is open.

    A float gate adds `(gate - stop_gradient(gate)) * (new - h)`, which is zero forward. Training
    then sees bitwise the hidden states of inference, with the gradients of
    `h + gate * (new - h)`, also to the router of a layer that was skipped.
    """
    rows = gate[:, None, None] if gate.ndim else gate
    if not jnp.issubdtype(gate.dtype, jnp.floating):
        return jnp.where(rows, new, h)
    through = (rows - lax.stop_gradient(rows)).astype(h.dtype)
    return jnp.where(rows > 0.5, new, h) + through * (new - h)


def _compact(
    block: BlockFn, params: Any, h: Array, context: PyTree, gate: Bool[Array, "B"]
) -> Array:
    """Compaction on every batch shard by itself, each with its own number of rows.

    Parameters enter whole along the batch axes: a gather inside a branch that other shards do not
    take would wait for them for ever. The tensor axis stays with the compiler.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or num_batch_shards(mesh) == 1:
        return _compact_rows(block, params, h, context, gate)
    rows = P(BATCH_AXES)
    return jax.shard_map(
        lambda *args: _compact_rows(block, *args),
        in_specs=(P(), rows, rows, rows),
        out_specs=rows,
        axis_names=set(BATCH_AXES),
        check_vma=False,
    )(params, h, context, gate)


def _compact_rows(
    block: BlockFn, params: Any, h: Array, context: PyTree, gate: Bool[Array, "B"]
) -> Array:
    num_rows = h.shape[0]
    unit = -(-num_rows // MAX_BRANCHES)
    sizes = [*range(0, num_rows, unit), num_rows]
    order = jnp.argsort(~gate, stable=True)  # rows that execute first

    def branch(size):
        def run():
            if size == 0:
                return h
            if size == num_rows:  # nothing to move; rounding up may have taken in rows that skip
                return choose(gate, h, block(params, h, context))
            rows = order[:size]
            old = h[rows]
            new = block(params, old, jax.tree.map(lambda x: x[rows], context))
            # Rounding up again: rows that skip keep their state.
            return h.at[rows].set(choose(gate[rows], old, new), unique_indices=True)

        return run

    return lax.switch(-(-jnp.sum(gate) // unit), [branch(size) for size in sizes])
