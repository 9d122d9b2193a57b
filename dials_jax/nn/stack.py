"""Runs the layers of a transformer, each row through those that its gate opens.

The stack knows gates, not routers, and layers with a cache state, not caches. A `Policy` turns
hidden states into a gate per sequence, and one of three executors carries the gates out, with equal
results up to rounding. A layer that is skipped leaves its cache state (keys and values) as it was:
a later model call reads what the layer last wrote for that sequence.

- `select`: every layer computed, rows chosen afterwards. Training, and the reference.
- `cond`: one `lax.cond` a layer, for a decision that all rows share.
- `compact`: decisions a row. Rows that execute move to the front and the block runs on that slice
  only, so that time follows the executed share at any batch size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, get_args, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, PyTree

from dials_jax import trees
from dials_jax.config import shown
from dials_jax.errors import InputError, nearest, require
from dials_jax.nn.gates import MAX_BRANCHES, Compaction, Gate, Slice, apply_gate
from dials_jax.nn.kv import gather
from dials_jax.sharding import BATCH_AXES, constrain_batch, num_batch_shards

Executor = Literal["auto", "select", "cond", "compact"]


class Layer(NamedTuple):
    """What a layer does; `output_positions` [B, W], None: all.

    With a cache state it has two halves, and the cache state is written between them: then no
    choice of sequences carries a cache state along, and none is copied.

    Attributes:
      block: `block(params, h, context, output_positions) -> h`, without a cache state.
      project: `project(params, h, context, output_positions) -> (queries, update)`.
      mix: `mix(params, h, queries, cache_state, context, output_positions) -> h`, from the h at
        the output positions.
      remember: `remember(cache_state, update, context, keep) -> cache_state`. Sequences where
        `keep` is False stay as they were; None: all are written.
    """

    block: Callable[..., Array]
    project: Callable[..., tuple[PyTree, PyTree]] | None = None
    mix: Callable[..., Array] | None = None
    remember: Callable[..., PyTree] | None = None


class Denoising(NamedTuple):
    """What a policy may know about a batch beside its hidden states."""

    masked: Bool[Array, "B T"]  # [MASK] now, and not padding
    step: Int[Array, ""]  # denoising step, from 0
    sequence_keys: PyTree  # one random key per sequence
    prompt_length: int = 0  # this many first tokens are never masked: routers leave them out


@runtime_checkable
class Policy(Protocol):
    """Decides which rows run a layer."""

    def prepare(self, num_layers: int, denoising: Denoising) -> PyTree:
        """All that is known before the first layer, stacked or unrolled as layers are."""

    def gate(self, plan: PyTree, h: Float[Array, "B T D"], denoising: Denoising) -> Gate:
        """Whether to run a layer, from its slice of the plan. One boolean, or one a row.

        A NumPy boolean is known while tracing and leaves no branch in the program.

        A float gate is 0 or 1 with a straight-through gradient; only `select` takes it.
        """


def check_policy(policy: object) -> None:
    """Raises: InputError for what is neither None nor a policy."""
    known = isinstance(policy, Policy) and not isinstance(policy, type)
    if policy is not None and not known:  # else its weights would be fetched for the text
        require(
            not hasattr(policy, "plan") or hasattr(policy, "prepare"),
            f"{type(policy).__name__}.plan is now called `prepare`; rename that method",
        )
        raise InputError(
            f"policy={shown(policy)} is no policy; give None, or one as Static((7, 9))"
        )


class StackOutput(NamedTuple):
    """`gates` [L, B]; cache states, and what `observe` returned, are laid out as the layers."""

    h: Float[Array, "B T D"]
    gates: Array
    cache_state: PyTree
    observed: PyTree


def run_stack(
    layer: Layer,
    layers: trees.Params,
    h: Float[Array, "B T D"],
    context: PyTree,
    policy: Policy | None,
    denoising: Denoising,
    *,
    span: tuple[int, int] | None = None,
    cache_state: PyTree = None,
    force_execute: Bool[Array, ""] | None = None,
    output_positions: Int[Array, "B W"] | None = None,
    executor: Executor = "auto",
    observe: Callable[[Array, Array], PyTree] | None = None,
) -> StackOutput:
    """Runs `layers`, stacked (a scan) or unrolled (a Python loop, no weight copies).

    Args:
      context: rows of whatever the block needs beside h; every leaf leads with the batch.
      span: runs layers [first, last) only; None runs all.
      cache_state: one a layer that runs, laid out as the layers are.
      force_execute: True on the call that fills the caches. All gates are then forced open, except
        those of a policy that skips a layer at every step, which never reads that layer's cache.
      output_positions: of the tokens whose output is asked for; None: all. The last layer then
        computes queries, and all that follows them, for these only.
      observe: called with each layer's input and output.

    Raises: InputError for an unknown executor, ValueError for decisions a row under `cond`.
    """

    def gate_of(plan, h):
        gate = np.True_ if policy is None else policy.gate(plan, h, denoising)
        return gate if force_execute is None or isinstance(gate, np.bool_) else gate | force_execute

    def run_layer(h, xs):
        params, plan, cache_state = xs
        gate = gate_of(plan, h)
        new, cache_state = _execute_layer(layer, params, h, context, cache_state, gate, executor)
        new = constrain_batch(new)
        seen = observe(h, new) if observe else None
        return new, (jnp.broadcast_to(gate, h.shape[:1]), cache_state, seen)

    def run_last(h, xs):
        params, plan, cache_state = xs
        gate, near = gate_of(plan, h), gather(h, output_positions)
        context_here = (h, context, output_positions)
        new, cache_state = _execute_layer(
            _last(layer), params, near, context_here, cache_state, gate, executor
        )
        return constrain_batch(new), (jnp.broadcast_to(gate, h.shape[:1]), cache_state, None)

    count = trees.num_layers(layers)
    first, last = span or (0, count)
    plan = policy.prepare(count, denoising) if policy else None
    if trees.is_unrolled(plan) and not trees.is_unrolled(layers):
        plan = trees.stack(plan)
    if isinstance(plan, np.ndarray) and plan.dtype == bool:  # the gates of every step
        force_execute = None
    h = constrain_batch(h)
    if trees.is_unrolled(layers):
        outputs = []
        for i in range(first, last):
            past = None if cache_state is None else cache_state[i - first]
            run = run_layer if output_positions is None or i < count - 1 else run_last
            h, output = run(h, (layers[i], trees.layer_slice(plan, i), past))
            outputs.append(output)
        gates, cache_states, seen = zip(*outputs, strict=True)
        observed = jax.tree.map(lambda *x: jnp.stack(x), *seen)
        return StackOutput(
            h, jnp.stack(gates), None if cache_state is None else cache_states, observed
        )
    if last - first == count:
        xs, body = (layers, plan, cache_state), run_layer
    else:  # by number: slicing the stack first would copy these layers' weights
        xs = (jnp.arange(first, last), jax.tree.map(lambda x: x[first:last], plan), cache_state)

        def body(h, xs):
            return run_layer(h, (trees.layer_slice(layers, xs[0]), *xs[1:]))

    h, (gates, cache_state, observed) = lax.scan(body, h, xs)
    h = h if output_positions is None or last < count else gather(h, output_positions)
    return StackOutput(h, gates, cache_state, observed)


def _last(layer: Layer) -> Layer:
    """The layer as a step from h at the output positions; all of h is in its context."""

    def block(params, near, context):
        return layer.block(params, *context)

    def project(params, near, context):
        return layer.project(params, *context)

    def mix(params, near, q, cache_state, context):
        return layer.mix(params, near, q, cache_state, *context[1:])

    def remember(cache_state, update, context, keep):
        return layer.remember(cache_state, update, context[1], keep)

    return Layer(block, project, mix, remember)


def _execute_layer(
    layer: Layer,
    params: Any,
    h: Array,
    context: PyTree,
    cache_state: PyTree,
    gate: Any,
    executor: str,
) -> tuple[Array, PyTree]:
    """One layer, by the executor that fits its gate."""
    known = get_args(Executor)
    require(executor in known, f"executor={executor!r} is unknown{nearest(executor, known)}")

    def run(keep=None):
        if cache_state is None:
            return layer.block(params, h, context), None
        q, update = layer.project(params, h, context)
        written = layer.remember(cache_state, update, context, keep)
        return layer.mix(params, h, q, written, context), written

    if isinstance(gate, np.bool_):  # known while tracing: no branch in the program
        return run() if gate else (h, cache_state)
    per_row = gate.ndim == 1
    if executor == "auto":
        executor = "compact" if per_row and h.shape[0] > 1 else "cond"
    if jnp.issubdtype(gate.dtype, jnp.floating) and executor != "select":
        raise ValueError(f"executor={executor!r} drops a float gate's gradient; use 'select'")
    if executor == "select":
        new, cache_state = run(None if cache_state is None else jnp.broadcast_to(gate, h.shape[:1]))
        return apply_gate(gate, h, new), cache_state
    if executor == "compact" and per_row:
        return _compact(layer, params, h, context, cache_state, gate)
    if per_row and h.shape[0] > 1:
        raise ValueError("executor='cond' needs one decision for all rows; use 'compact'")
    on = gate[0] if per_row else gate
    return lax.cond(on, run, lambda: (h, cache_state))


def _compact(
    layer: Layer,
    params: Any,
    h: Array,
    context: PyTree,
    cache_state: PyTree,
    gate: Bool[Array, "B"],
) -> tuple[Array, PyTree]:
    """Compaction on every batch shard by itself, each with its own number of rows.

    Parameters enter whole along the batch axes: a gather inside a branch that other shards do not
    take would wait for them for ever. The tensor axis stays with the compiler.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or num_batch_shards(mesh) == 1:
        return _compact_rows(layer, params, h, context, cache_state, gate)
    rows = P(BATCH_AXES)
    return jax.shard_map(
        lambda *args: _compact_rows(layer, *args),
        in_specs=(P(), rows, rows, rows, rows),
        out_specs=rows,
        axis_names=set(BATCH_AXES),
        check_vma=False,
    )(params, h, context, cache_state, gate)


def _compact_rows(
    layer: Layer,
    params: Any,
    h: Array,
    context: PyTree,
    cache_state: PyTree,
    gate: Bool[Array, "B"],
) -> tuple[Array, PyTree]:
    # With a cache state every kind of model call has branches of its own, and there are many kinds.
    max_branches = MAX_BRANCHES if cache_state is None else MAX_BRANCHES // 2
    compact = Compaction(gate, h.shape[1], max_branches)

    def block(rows: Slice) -> Array:
        return rows.apply_gate(h, layer.block(params, *rows.take((h, context))))

    def project(rows: Slice) -> tuple[PyTree, PyTree]:
        return rows.spread(layer.project(params, *rows.take((h, context))))

    def run(h: Array, cache_state: PyTree) -> tuple[Array, PyTree]:
        q, update = compact(project)
        written = layer.remember(cache_state, update, context, gate)

        def mix(rows: Slice) -> Array:
            near, *rest = rows.take((h, q, written, context))
            return rows.apply_gate(h, layer.mix(params, near, *rest))

        return compact(mix), written

    if cache_state is None:
        return compact.or_else(block, h), None
    # The cache state passes through a choice of two: one of more would copy it.
    return lax.cond(compact.any, run, lambda *as_it_was: as_it_was, h, cache_state)
