"""The executors on a toy block in which tokens of a row mix, and on the transformer itself."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AbstractMesh
from jax.test_util import check_grads

from dials_jax import trees
from dials_jax.models.model import Model
from dials_jax.nn.gates import apply_gate
from dials_jax.nn.policy import Denoising
from dials_jax.nn.stack import run_stack
from dials_jax.sharding import AXES
from dials_jax.skipping.policies import Random, Static
from dials_jax.skipping.routed import Routed
from tests.nn.toy import (
    LAYER,
    LAYERS,
    Context,
    Given,
    L,
    block,
    make_rows,
    run,
)


@pytest.fixture(scope="module")
def policies(routers):
    thresholds = np.linspace(0.4, 0.6, L)
    return {
        "static": Static((1, 2)),
        "random": Random(2),
        "routed": Routed(routers, 0.5),
        "soft": Routed(routers, thresholds, votes="soft"),
    }


@pytest.mark.parametrize(
    "kind, num_rows, unrolled",
    [("random", 3, False), ("random", 3, True), ("soft", 3, True), ("routed", 11, False)],
)
def test_compact_equals_select(policies, kind, num_rows, unrolled):
    rows = make_rows(num_rows)
    h, gates = run(policies[kind], rows, "select", unrolled)
    compact_h, compact_gates = run(policies[kind], rows, "compact", unrolled)
    np.testing.assert_array_equal(compact_gates, gates)
    np.testing.assert_allclose(compact_h, h, atol=1e-5)
    assert gates.any() and not gates.all()


@pytest.mark.parametrize("unrolled", [False, True])
def test_routers_may_be_laid_out_either_way(routers, policies, unrolled):
    rows = make_rows(3)
    own_arrays = Routed(trees.unstack(routers), 0.5)
    h, gates = run(policies["routed"], rows, "compact", unrolled)
    other_h, other_gates = run(own_arrays, rows, "compact", unrolled)
    np.testing.assert_array_equal(gates, other_gates)
    np.testing.assert_allclose(h, other_h, atol=1e-6)


@pytest.mark.parametrize("num_rows", [*range(1, 9), 11])  # 11: slices are rounded up to pairs
def test_compact_handles_every_number_of_executing_rows(num_rows):
    # Layer by layer, 0..3 and the last 1..4 rows execute, scattered by a permutation.
    order = np.random.default_rng(0).permutation(num_rows)
    all_rows = make_rows(11)  # selection computes each row by itself: one program for all numbers
    for counts in (range(4), range(num_rows - 3, num_rows + 1)):
        gates = np.array([order < count for count in counts])
        padded = np.pad(gates, ((0, 0), (0, 11 - num_rows)))
        expected, _ = run(Given(jnp.asarray(padded)), all_rows, "select")
        h, _ = run(Given(jnp.asarray(gates)), _rows(all_rows, 0, num_rows), "compact")
        np.testing.assert_allclose(h, expected[:num_rows], atol=1e-5)


@pytest.mark.parametrize("kind", ["static", "random", "routed", "soft"])
def test_one_row_gives_the_same_under_every_executor(policies, kind):
    rows = make_rows(1)
    h, gates = run(policies[kind], rows, "select")
    for executor, unrolled in (("cond", False), ("compact", False), ("auto", True)):
        other_h, other_gates = run(policies[kind], rows, executor, unrolled)
        np.testing.assert_array_equal(other_gates, gates)
        np.testing.assert_allclose(other_h, h, atol=1e-5)


def test_a_shared_gate_gives_the_same_under_every_executor():
    rows = make_rows(3)
    for policy in (Static((0, 3)), Given(jnp.array([True, False, False, True]))):
        h, gates = run(policy, rows, "select")
        for executor, unrolled in (("cond", False), ("compact", False), ("auto", True)):
            other_h, other_gates = run(policy, rows, executor, unrolled)
            np.testing.assert_array_equal(other_gates, gates)
            np.testing.assert_allclose(other_h, h, atol=1e-5)
        assert gates.shape == (L, 3)


@pytest.mark.parametrize("kind", ["random", "routed"])
def test_a_row_does_not_depend_on_the_rest_of_its_batch(policies, kind):
    batch = make_rows(5)
    h, gates = run(policies[kind], batch)
    for i in range(5):
        row_h, row_gates = run(policies[kind], _rows(batch, i, i + 1))
        np.testing.assert_array_equal(row_gates[:, 0], gates[:, i])
        np.testing.assert_allclose(row_h[0], h[i], atol=1e-5)


def _rows(rows, start, end):
    h, context, (masked, step, keys, *_) = rows
    only = slice(start, end)
    return h[only], Context(context.valid[only]), Denoising(masked[only], step, keys[only])


def test_skipping_everything_returns_the_input():
    rows = make_rows(3)
    closed = Given(jnp.zeros((L, 3), bool))
    for policy in (Static(range(L)), Random(L), closed):
        h, gates = run(policy, rows)
        np.testing.assert_array_equal(h, rows[0])
        assert not gates.any()


def test_skipping_nothing_equals_no_policy():
    rows = make_rows(3)
    expected, gates = run(None, rows)
    assert gates.all() and gates.shape == (L, 3)
    for policy in (Static(()), Random(0), Given(jnp.ones((L, 3), bool))):
        np.testing.assert_allclose(run(policy, rows)[0], expected, atol=1e-5)


def test_layers_run_in_order_in_both_layouts():
    rows = make_rows(2)
    expected = rows[0]
    for i in range(L):
        expected = block(trees.layer_slice(LAYERS, i), expected, rows[1])
    for unrolled in (False, True):
        np.testing.assert_allclose(run(None, rows, unrolled=unrolled)[0], expected, atol=1e-5)


def test_cond_refuses_decisions_per_sequence():
    with pytest.raises(ValueError, match="one decision for all sequences"):
        run(Random(1), make_rows(2), "cond")


def test_observe_sees_the_input_and_the_output_of_every_layer():
    h, context, denoising = make_rows(2)
    for layers in (LAYERS, trees.unstack(LAYERS)):
        out = run_stack(
            LAYER, layers, h, context, Static((2,)), denoising, observe=lambda a, b: (a, b)
        )
        before, after = out.observed
        np.testing.assert_array_equal(before[0], h)
        np.testing.assert_array_equal(before[1:], after[:-1])
        np.testing.assert_array_equal(after[2], before[2])  # skipped
        np.testing.assert_array_equal(after[-1], out.h)


# ------------------------------------------------------------------------- straight-through gates


@pytest.mark.parametrize("opened", [0.0, 1.0])
def test_a_float_gate_selects_bitwise_like_a_boolean(opened):
    h, context, _ = make_rows(3)
    new = block(trees.layer_slice(LAYERS, 0), h, context)
    gate = jnp.full(3, opened)
    np.testing.assert_array_equal(apply_gate(gate, h, new), apply_gate(gate > 0.5, h, new))


def test_a_float_gate_has_the_gradient_of_interpolation():
    h, context, _ = make_rows(4)
    gate = jnp.array([0.0, 1.0, 1.0, 0.0])
    w = trees.layer_slice(LAYERS, 0)

    def loss(combine):
        return lambda gate, h, w: jnp.sum(jnp.sin(combine(gate, h, block(w, h, context))))

    def interpolate(gate, h, new):
        return h + gate[:, None, None] * (new - h)

    ours = jax.grad(loss(apply_gate), argnums=(0, 1, 2))(gate, h, w)
    plain = jax.grad(loss(interpolate), argnums=(0, 1, 2))(gate, h, w)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, plain)
    assert (np.abs(ours[0]) > 1e-3).all()  # rows that skip, too
    check_grads(lambda g: loss(interpolate)(g, h, w), (gate,), order=1, modes=["rev"], rtol=1e-2)


# --------------------------------------------------------------------------------- whole programs


def num_conditionals(policy, num_rows, executor="auto"):
    """`conditional` instructions in the optimised program of unrolled layers."""
    h, context, denoising = make_rows(num_rows)
    program = jax.jit(
        lambda layers, policy: run_stack(
            LAYER, layers, h, context, policy, denoising, executor=executor
        )
    )
    text = program.lower(trees.unstack(LAYERS), policy).compile().as_text()
    return len(re.findall(r" conditional\(", text))


def test_skipped_work_is_really_left_out():
    shared = Given(jnp.array([True, False, True, True]))
    assert num_conditionals(shared, 4) == L  # one branch a layer
    assert num_conditionals(Random(2), 1) == L  # one row: its decision is shared
    assert num_conditionals(Random(2), 4) == L  # one switch a layer
    assert num_conditionals(Random(2), 4, "select") == 0
    assert num_conditionals(Static((1,)), 4) == 0  # known while tracing


def slices_of_weights(jaxpr, inside=False):
    """For each slice of a layer's weights out of the stack: whether a branch makes it."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dynamic_slice":
            stack = equation.invars[0].aval.shape
            found += [inside] if stack == LAYERS["w"].shape else []
        within = inside or equation.primitive.name == "cond"
        for inner in jaxprs_in_params(equation.params):
            found += slices_of_weights(inner, within)
    return found


@pytest.mark.parametrize("over_memory", [False, True])
@pytest.mark.parametrize("policy", [Static((1,)), Random(2)])
def test_weights_are_taken_out_of_a_stack_where_they_are_used(policy, over_memory):
    """What a branch takes from outside is a copy, also of a layer that is skipped."""
    h, context, denoising = make_rows(4)
    memory = {"mean": jnp.zeros((L, 4, LAYERS["w"].shape[-1]))} if over_memory else None
    traced = jax.make_jaxpr(
        lambda layers: run_stack(LAYER, layers, h, context, policy, denoising, cache_state=memory)
    )(LAYERS)
    found = slices_of_weights(traced.jaxpr)
    assert found and all(found)


def test_weights_that_batch_shards_gather_are_taken_out_of_a_stack_first():
    """Otherwise they would gather the whole stack."""
    h, context, denoising = make_rows(4)
    with jax.sharding.use_abstract_mesh(AbstractMesh((1, 2, 1), AXES)):
        traced = jax.make_jaxpr(
            lambda layers: run_stack(LAYER, layers, h, context, Random(2), denoising).h
        )(LAYERS)
    assert not any(slices_of_weights(traced.jaxpr))


@pytest.mark.parametrize("kind, unrolled", [("random", False), ("routed", True)])
def test_the_transformer_agrees_with_left_padding(lively, cfg, policies, kind, unrolled):
    tokens = np.random.default_rng(0).integers(2, 60, (3, 8))
    tokens[:, 5:] = cfg.mask_id
    valid = np.arange(8) >= np.array([0, 2, 3])[:, None]
    key = jax.random.key(4)
    expected = lively.apply(tokens, valid, policies[kind], key=key, executor="select")
    if unrolled:
        layers = trees.unstack(lively.params["layers"])
        lively = Model(cfg, {**lively.params, "layers": layers})
    out = lively.apply(tokens, valid, policies[kind], key=key, executor="compact")
    np.testing.assert_array_equal(out.gates, expected.gates)
    np.testing.assert_allclose(out.logits[valid], expected.logits[valid], atol=1e-5)
    assert out.gates.any() and not out.gates.all()
