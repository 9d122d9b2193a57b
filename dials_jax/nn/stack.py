"""Runs the layers of a transformer, each sequence through those that its gates open.

The stack knows gates, not routers, and layers with a cache state, not caches. A policy gives a
gate per layer and sequence, and one of three executors carries the gates out, with equal results up
to rounding. A layer that is skipped leaves its cache state (keys and values) as it was: a later
model call reads what the layer last wrote for that sequence.

- `select`: every layer is computed, and the gate chooses afterwards. Training, and the reference.
- `cond`: one `lax.cond` per layer, for a decision that all sequences share.
- `compact`: decisions per sequence. Sequences that execute move to the front and the block runs on
  that slice only, so that time follows the executed share at any batch size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, PyTree

from dials_jax import trees
from dials_jax.errors import nearest, require
from dials_jax.nn.gates import MAX_BRANCHES, Compaction, Gate, Slice, apply_gate
from dials_jax.nn.kernels.hopper_peers import with_flags
from dials_jax.nn.kv import gather
from dials_jax.nn.policy import (
    Denoising,
    Policy,
    decide_gate,
    init_policy_state,
    prepare_policy,
    static_gates,
)
from dials_jax.sharding import BATCH_AXES, constrain_batch, num_batch_shards

Executor = Literal["auto", "select", "cond", "compact"]


class Layer(NamedTuple):
    """What a layer computes, as functions of its parameters.

    With a cache state a layer has two halves, and the cache state is written between them: then no
    choice of sequences carries a cache state along, and none is copied.

    Attributes:
      block: `block(params, h, context) -> h`, without a cache state.
      project: `project(params, h, context) -> (queries, update)`.
      write: `write(cache_state, update, context, keep) -> cache_state`. Sequences where `keep` is
        False stay as they were; None: all are written.
      mix: `mix(params, h, queries, cache_state, context) -> h`.

    `context` is a NamedTuple whose leaves lead with the batch. Where its `output_positions` [B, W]
    are not None, `block` and `mix` return h at these positions only, and `mix` is given only these.
    """

    block: Callable[..., Array]
    project: Callable[..., tuple[PyTree, PyTree]] | None = None
    write: Callable[..., PyTree] | None = None
    mix: Callable[..., Array] | None = None


class StackOutput(NamedTuple):
    """What the layers leave.

    Attributes:
      h: at the output positions.
      gates: [L, B], True or 1 where a layer ran.
      cache_state: laid out as the layers are.
      observed: what `observe` returned, stacked.
      policy_state: what the policy carries into the next layers.
    """

    h: Float[Array, "B W D"]
    gates: Array
    cache_state: PyTree
    observed: PyTree
    policy_state: PyTree


@with_flags
def run_stack(
    layer: Layer,
    layers: trees.Params,
    h: Float[Array, "B T D"],
    context: Any,
    policy: Policy | None,
    denoising: Denoising,
    *,
    span: tuple[int, int] | None = None,
    cache_state: PyTree = None,
    policy_state: PyTree = None,
    executor: Executor = "auto",
    observe: Callable[[Array, Array], PyTree] | None = None,
) -> StackOutput:
    """Runs `layers`, stacked (a scan) or unrolled (a Python loop, no weight copies).

    Args:
      context: see `Layer`. The last layer gets it as it is and computes queries, and all that
        follows them, at the output positions only; all others are asked for every position.
      span: runs layers [first, last) only; None runs all.
      cache_state: one per layer that runs, laid out as the layers are.
      policy_state: of the span before; None at the first layer.
      observe: called with each layer's input and output.

    Raises: InputError for an unknown executor, and one that cannot carry the policy's gates out.
    """
    known = get_args(Executor)
    require(executor in known, f"executor={executor!r} is unknown{nearest(executor, known)}")
    count = trees.num_layers(layers)
    first, last = span or (0, count)
    always = static_gates(policy, count)
    if always is None:
        prepared = prepare_policy(policy, count, denoising)
    else:
        prepared = None if always.all() else always
    inner, output_positions = context._replace(output_positions=None), context.output_positions

    def run_layer(carry, xs, context=inner, gate=None):
        h, state = carry
        params, prepared, cache_state = xs
        if always is None:
            gate, state = decide_gate(policy, prepared, h, denoising, state)
        elif gate is None:
            gate = np.True_ if prepared is None else prepared
        new, cache_state = _execute_layer(layer, params, h, context, cache_state, gate, executor)
        new = constrain_batch(new)
        seen = observe(h, new) if observe else None
        return (new, state), (jnp.broadcast_to(gate, h.shape[:1]), cache_state, seen)

    h = constrain_batch(h)
    carry = h, init_policy_state(policy, h, denoising) if policy_state is None else policy_state
    if trees.is_unrolled(layers):
        # Over a cache, with its many forward variants, layers of one shape are traced and lowered
        # once; XLA then puts the body in for each call. Gradients never go through a cache.
        run_one = run_layer
        if cache_state is not None:
            run_one = jax.jit(run_layer, static_argnames="gate")
        outputs, fixed = [], always is not None
        for i in range(first, last):
            past = trees.layer_slice(cache_state, i - first)
            xs = layers[i], None if fixed else trees.layer_slice(prepared, i), past
            at = inner if i < count - 1 else context
            carry, output = run_one(carry, xs, at, gate=always[i] if fixed else None)
            outputs.append(output)
        gates, cache_states, seen = zip(*outputs, strict=True)
        observed = jax.tree.map(lambda *x: jnp.stack(x), *seen)
        cache_state = None if cache_state is None else cache_states
        return StackOutput(carry[0], jnp.stack(gates), cache_state, observed, carry[1])
    prepared = trees.stack(prepared) if trees.is_unrolled(prepared) else prepared
    prepared = jax.tree.map(lambda x: x[first:last], prepared)
    may_skip = executor != "select" and (always is None or prepared is not None)
    # `run_layer` runs what `layer` is from here on.
    layer, steps, params_of = _scan_inputs(layer, layers, (first, last), may_skip)

    def body(carry, xs):
        return run_layer(carry, (params_of(xs[0]), *xs[1:]))

    (h, state), (gates, cache_state, observed) = lax.scan(
        body, carry, (steps, prepared, cache_state)
    )
    if output_positions is not None and last == count:
        h = gather(h, output_positions)
    return StackOutput(h, gates, cache_state, observed, state)


def _scan_inputs(
    layer: Layer, layers: trees.Params, span: tuple[int, int], may_skip: bool
) -> tuple[Layer, PyTree, Callable[[PyTree], PyTree]]:
    """How a scan takes layers out of their stack.

    Returns: the layer to run, what the scan goes through, and what makes the layer's parameters of
    one step of it.
    """
    if may_skip and not _splits_weights_along_batch():
        return _sliced_where_used(layer), jnp.arange(*span), lambda number: (layers, number)
    if span == (0, trees.num_layers(layers)):
        return layer, layers, lambda params: params
    # By number: slicing the stack first would copy these layers' weights.
    return layer, jnp.arange(*span), lambda number: trees.layer_slice(layers, number)


def _sliced_where_used(layer: Layer) -> Layer:
    """The same layer, whose parameters are a stack and a number in it.

    What a branch takes as a layer's parameters, compilers first copy out of the stack. A slice
    within the branch is a part of the matmul that reads it. Gradients are then as large as the
    stack for each layer: training selects.
    """

    def sliced(fn):
        return lambda params, *args: fn(trees.layer_slice(*params), *args)

    return layer._replace(
        block=sliced(layer.block), project=sliced(layer.project), mix=sliced(layer.mix)
    )


def _splits_weights_along_batch() -> bool:
    """Whether batch shards gather weights before they use them: then a layer's, not the stack."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.shape["fsdp"] > 1


def _execute_layer(
    layer: Layer,
    params: Any,
    h: Float[Array, "B T D"],
    context: Any,
    cache_state: PyTree,
    gate: Gate,
    executor: Executor,
) -> tuple[Float[Array, "B W D"], PyTree]:
    """One layer where its gate is open, by the executor that fits the gate: DIALS (7)."""
    kept = _at_output_positions(h, context)  # what a skipped layer leaves

    def run(write_where=None):
        if cache_state is None:
            return layer.block(params, h, context), None
        q, update = layer.project(params, h, context)
        written = layer.write(cache_state, update, context, write_where)
        return layer.mix(params, kept, q, written, context), written

    if isinstance(gate, np.bool_):  # known while tracing: no branch in the program
        return run() if gate else (kept, cache_state)
    per_sequence = gate.ndim == 1
    if executor == "auto":
        executor = "compact" if per_sequence and h.shape[0] > 1 else "cond"
    is_float = jnp.issubdtype(gate.dtype, jnp.floating)
    require(
        executor == "select" or not is_float,
        f"executor={executor!r} drops a float gate's gradient; use 'select'",
    )
    if executor == "select":
        where = None if cache_state is None else jnp.broadcast_to(gate, h.shape[:1])
        new, cache_state = run(where)
        return apply_gate(gate, kept, new), cache_state
    if executor == "compact" and per_sequence:
        return _compact(layer, params, h, context, cache_state, gate)
    require(
        not per_sequence or h.shape[0] == 1,
        "executor='cond' needs one decision for all sequences; use 'compact'",
    )
    on = gate[0] if per_sequence else gate
    return lax.cond(on, run, lambda: (kept, cache_state))


def _at_output_positions(h: Float[Array, "B T D"], context: Any) -> Float[Array, "B W D"]:
    return h if context.output_positions is None else gather(h, context.output_positions)


def _compact(layer: Layer, params: Any, *batch: PyTree) -> tuple[Float[Array, "B W D"], PyTree]:
    """Compaction on every batch shard separately, each with its own number of sequences.

    Parameters enter whole along the batch axes: a gather inside a branch that other shards do not
    take would deadlock. The tensor axis is left to the compiler.

    Args:
      batch: h, context, cache_state and gate, as `_compact_shard` takes them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or num_batch_shards(mesh) == 1:
        return _compact_shard(layer, params, *batch)
    sequences = P(BATCH_AXES)
    return jax.shard_map(
        lambda *args: _compact_shard(layer, *args),
        in_specs=(P(), *(sequences for _ in batch)),
        out_specs=sequences,
        axis_names=set(BATCH_AXES),
        check_vma=False,
    )(params, *batch)


def _compact_shard(
    layer: Layer,
    params: Any,
    h: Float[Array, "B T D"],
    context: Any,
    cache_state: PyTree,
    gate: Bool[Array, "B"],
) -> tuple[Float[Array, "B W D"], PyTree]:
    kept = _at_output_positions(h, context)
    # With a cache state every forward variant has its own branches, and there are many variants.
    max_branches = MAX_BRANCHES if cache_state is None else MAX_BRANCHES // 2
    compact = Compaction(gate, kept.shape[1], max_branches)

    def block(part: Slice) -> Array:
        return part.apply_gate(kept, layer.block(params, *part.take((h, context))))

    def project(part: Slice) -> tuple[PyTree, PyTree]:
        return part.spread(layer.project(params, *part.take((h, context))))

    def run(kept: Array, cache_state: PyTree) -> tuple[Array, PyTree]:
        q, update = compact(project)
        written = layer.write(cache_state, update, context, gate)

        def mix(part: Slice) -> Array:
            return part.apply_gate(kept, layer.mix(params, *part.take((kept, q, written, context))))

        return compact(mix), written

    if cache_state is None:
        return compact.or_else(block, kept), None
    # The cache state passes through a choice of two: one of more would copy it.
    return lax.cond(compact.any, run, lambda *unchanged: unchanged, kept, cache_state)
