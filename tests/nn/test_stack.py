"""The executors on a toy block in which tokens of a row mix, and on the transformer itself."""

import re
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from dials_jax import trees
from dials_jax.models.model import Model
from dials_jax.nn.kv import gather
from dials_jax.nn.stack import Denoising, Layer, choose, run_stack
from dials_jax.skipping.policies import Random, Routed, Static

T, D, L = 5, 32, 4  # D and L are those of the routers fixture


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Given:
    """Gates that a test states: [L, B], or [L] for all rows together."""

    gates: Any

    def plan(self, num_layers, denoising):
        return self.gates

    def gate(self, plan, h, denoising):
        return plan


def project(params, h, context, wanted=None):
    """The mean of a row's valid tokens: once to mix in, and once to remember."""
    valid = context["valid"][..., None]
    mean = jnp.sum(h * valid, axis=1) / jnp.sum(valid, axis=1)
    return mean, {"mean": mean}


def mix(params, h, mean, memory, context, wanted=None):
    """A residual block that mixes the tokens of a row with what it remembers of the row."""
    return h + jnp.tanh((h + (mean + memory["mean"])[:, None]) @ params["w"])


def block(params, h, context, wanted=None):
    mean, update = project(params, h, context)
    return mix(params, h if wanted is None else gather(h, wanted), mean, update, context)


def remember(memory, update, context, keep):
    """Adds to half of what was remembered, in the rows to keep."""

    def put(old, new):
        new = old / 2 + new
        return new if keep is None else jnp.where(keep[:, None], new, old)

    return jax.tree.map(put, memory, update)


LAYER = Layer(block, project, mix, remember)

LAYERS = {"w": 0.3 * jax.random.normal(jax.random.key(0), (L, D, D))}


def make_rows(num_rows, seed=1):
    """Hidden states, left padding of 0, 1 or 2 tokens, and what a policy may know."""
    h = jax.random.normal(jax.random.key(seed), (num_rows, T, D))
    valid = jnp.arange(T) >= (jnp.arange(num_rows) % 3)[:, None]
    masked = valid & (jax.random.uniform(jax.random.key(seed + 1), (num_rows, T)) < 0.6)
    keys = jax.random.split(jax.random.key(seed + 2), num_rows)
    return h, {"valid": valid}, Denoising(masked, jnp.asarray(3), keys)


@partial(jax.jit, static_argnames=("span", "executor"))
def jitted(layers, h, context, policy, denoising, memory=None, *, executor, span=None):
    denoising = denoising._replace(vote_from=0)  # an argument would be traced
    return run_stack(
        LAYER, layers, h, context, policy, denoising, span=span, memory=memory, executor=executor
    )


def run(policy, rows, executor="auto", unrolled=False):
    layers = trees.unstack(LAYERS) if unrolled else LAYERS
    out = jitted(layers, rows[0], rows[1], policy, rows[2], executor=executor)
    return np.asarray(out.h), np.asarray(out.gates)


@pytest.fixture(scope="module")
def policies(routers):
    return {"static": Static((1, 2)), "random": Random(2), "routed": Routed(routers, 0.5)}


@pytest.mark.parametrize(
    "kind, num_rows, unrolled",
    [("random", 3, False), ("random", 3, True), ("routed", 3, True), ("routed", 11, False)],
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
    rows = make_rows(num_rows)
    order = np.random.default_rng(0).permutation(num_rows)
    for counts in (range(4), range(num_rows - 3, num_rows + 1)):
        gates = jnp.asarray(np.array([order < count for count in counts]))
        expected, _ = run(Given(gates), rows, "select")
        np.testing.assert_allclose(run(Given(gates), rows, "compact")[0], expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["static", "random", "routed"])
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
        row_h, row_gates = run(policies[kind], _row(batch, i))
        np.testing.assert_array_equal(row_gates[:, 0], gates[:, i])
        np.testing.assert_allclose(row_h[0], h[i], atol=1e-5)


def _row(rows, i):
    h, context, (masked, step, keys, _) = rows
    only = slice(i, i + 1)
    return h[only], {"valid": context["valid"][only]}, Denoising(masked[only], step, keys[only])


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


def test_cond_refuses_decisions_a_row():
    with pytest.raises(ValueError, match="one decision for all rows"):
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


# ------------------------------------------------------------------------------------ memory


def run_with_memory(policy, rows, executor, unrolled=False, span=None, layers=LAYERS):
    """Hidden states, gates, and the memory before and after, [layers that run, B, D]."""
    first, last = span or (0, trees.num_layers(layers))
    shape = (last - first, rows[0].shape[0], D)
    before = {"mean": jax.random.normal(jax.random.key(8), shape)}
    layers, memory = (trees.unstack(x) if unrolled else x for x in (layers, before))
    h, context, denoising = rows
    out = jitted(layers, h, context, policy, denoising, memory, executor=executor, span=span)
    after = jnp.stack([m["mean"] for m in out.memory]) if unrolled else out.memory["mean"]
    return np.asarray(out.h), np.asarray(out.gates), np.asarray(before["mean"]), np.asarray(after)


@pytest.mark.parametrize("num_rows", [3, 11])  # 11: slices are rounded up, rows that skip join in
@pytest.mark.parametrize(
    "executor, unrolled", [("select", True), ("compact", False), ("compact", True)]
)
def test_a_layer_that_is_skipped_keeps_its_memory(executor, unrolled, num_rows):
    rows, policy = make_rows(num_rows), Random(2)
    expected_h, gates, before, expected = run_with_memory(policy, rows, "select")
    np.testing.assert_array_equal(expected[~gates], before[~gates])
    assert (expected[gates] != before[gates]).all()
    h, other_gates, _, after = run_with_memory(policy, rows, executor, unrolled)
    np.testing.assert_array_equal(other_gates, gates)
    np.testing.assert_array_equal(after[~gates], before[~gates])
    np.testing.assert_allclose(after, expected, atol=1e-5)
    np.testing.assert_allclose(h, expected_h, atol=1e-5)
    assert np.abs(h - run(policy, rows)[0]).max() > 0.1  # the memory is read


@pytest.mark.parametrize("executor", ["select", "cond", "compact"])
@pytest.mark.parametrize("unrolled", [False, True])
def test_a_shared_gate_keeps_the_memory_of_a_skipped_layer(executor, unrolled):
    rows = make_rows(3)
    expected = run_with_memory(Static((0, 3)), rows, "select")  # no branch in the program
    policy = Given(jnp.array([False, True, True, False]))
    out = run_with_memory(policy, rows, executor, unrolled)
    for actual, wanted in zip(out, expected, strict=True):
        np.testing.assert_allclose(actual, wanted, atol=1e-5)
    np.testing.assert_array_equal(out[3][[0, 3]], out[2][[0, 3]])
    assert (out[3][1:3] != out[2][1:3]).all()


@pytest.mark.parametrize("unrolled", [False, True])
@pytest.mark.parametrize("span", [(0, 2), (1, 3), (3, 4)])
def test_a_span_is_a_smaller_stack(span, unrolled):
    rows, middle = make_rows(3), slice(*span)
    gates = jax.random.bernoulli(jax.random.key(3), 0.5, (L, 3))
    smaller = jax.tree.map(lambda x: x[middle], LAYERS)
    expected = run_with_memory(Given(gates[middle]), rows, "select", layers=smaller)
    out = run_with_memory(Given(gates), rows, "compact", unrolled, span)
    for actual, wanted in zip(out, expected, strict=True):
        np.testing.assert_allclose(actual, wanted, atol=1e-5)


# ------------------------------------------------------------------------- wanted, and must_run


@partial(jax.jit, static_argnames="executor")
def jitted_wanted(layers, h, context, policy, denoising, memory, wanted, must_run, *, executor):
    return run_stack(
        LAYER, layers, h, context, policy,
        denoising._replace(vote_from=0), memory=memory, wanted=wanted, must_run=must_run,
        executor=executor,
    )  # fmt: skip


def run_wanted(policy, rows, executor, unrolled, wanted=None, must_run=None):
    """Hidden states, gates and memory, layer by layer."""
    (h, context, denoising), layers = rows, LAYERS
    memory = {"mean": jax.random.normal(jax.random.key(8), (L, h.shape[0], D))}
    if unrolled:
        layers, memory = trees.unstack(layers), trees.unstack(memory)
    out = jitted_wanted(
        layers, h, context, policy, denoising, memory, wanted, must_run, executor=executor
    )
    after = jnp.stack([m["mean"] for m in out.memory]) if unrolled else out.memory["mean"]
    return np.asarray(out.h), np.asarray(out.gates), np.asarray(after)


GATES = jnp.array([[1, 0, 1], [1, 1, 0], [0, 1, 1], [1, 0, 0]], bool)  # [L, B]
MANY_GATES = jax.random.bernoulli(jax.random.key(5), 0.5, (L, 11))  # slices are rounded up


@pytest.mark.parametrize(
    "gates, executor",
    [
        (GATES, "select"),
        (GATES, "compact"),
        (MANY_GATES, "compact"),
        (GATES[:, 0], "cond"),
        (~GATES[:, 0], "cond"),
    ],
)
@pytest.mark.parametrize("unrolled", [False, True])
def test_wanted_tokens_are_those_of_the_whole(gates, executor, unrolled):
    rows = make_rows(gates.shape[1] if gates.ndim == 2 else 3)
    wanted = (jnp.arange(2) + jnp.arange(rows[0].shape[0])[:, None]) % T  # other places a row
    expected, gates_of_all, memory = run_wanted(Given(gates), rows, "select", False)
    h, gates, after = run_wanted(Given(gates), rows, executor, unrolled, wanted)
    np.testing.assert_allclose(h, gather(jnp.asarray(expected), wanted), atol=1e-5)
    np.testing.assert_array_equal(gates, gates_of_all)
    np.testing.assert_allclose(after, memory, atol=1e-5)  # of all tokens, wanted or not


@pytest.mark.parametrize("unrolled", [False, True])
@pytest.mark.parametrize("policy", [None, Static((1, 3))])
def test_wanted_tokens_without_branches(policy, unrolled):
    rows = make_rows(3)
    wanted = jnp.array([[0, 4], [3, 1], [2, 2]])
    expected, _, memory = run_wanted(policy, rows, "auto", False)
    h, _, after = run_wanted(policy, rows, "auto", unrolled, wanted)
    np.testing.assert_allclose(h, gather(jnp.asarray(expected), wanted), atol=1e-5)
    np.testing.assert_allclose(after, memory, atol=1e-5)


def test_the_last_block_is_asked_for_the_wanted_tokens_only():
    asked = []

    def block_of(params, h, context, wanted=None):
        asked.append(None if wanted is None else wanted.shape)
        return block(params, h, context, wanted)

    h, context, denoising = make_rows(3)
    wanted = jnp.zeros((3, 2), int)
    layers = trees.unstack(LAYERS)
    out = run_stack(Layer(block_of), layers, h, context, None, denoising, wanted=wanted)
    assert asked == [None, None, None, (3, 2)] and out.h.shape == (3, 2, D)


@pytest.mark.parametrize("unrolled", [False, True])
@pytest.mark.parametrize("executor", ["select", "compact"])
def test_layers_that_must_run_do(executor, unrolled):
    """All but those that are skipped at every step, in either layout."""
    rows = make_rows(3)
    expected = run_wanted(None, rows, "select", False)
    for policy in (Given(GATES), Given(GATES[:, 1]), Random(2)):
        out = run_wanted(policy, rows, executor, unrolled, must_run=jnp.array(True))
        for actual, of_all in zip(out, expected, strict=True):
            np.testing.assert_allclose(actual, of_all, atol=1e-5)
        free = run_wanted(policy, rows, executor, unrolled)
        out = run_wanted(policy, rows, executor, unrolled, must_run=jnp.array(False))
        jax.tree.map(np.testing.assert_array_equal, out, free)
        assert not free[1].all()
    _, gates, _ = run_wanted(Static((1, 3)), rows, executor, unrolled, must_run=jnp.array(True))
    np.testing.assert_array_equal(gates, [[True] * 3, [False] * 3] * 2)


# ------------------------------------------------------------------------- straight-through gates


@pytest.mark.parametrize("opened", [0.0, 1.0])
def test_a_float_gate_selects_bitwise_like_a_boolean(opened):
    h, context, _ = make_rows(3)
    new = block(trees.layer_slice(LAYERS, 0), h, context)
    gate = jnp.full(3, opened)
    np.testing.assert_array_equal(choose(gate, h, new), choose(gate > 0.5, h, new))


def test_a_float_gate_has_the_gradient_of_interpolation():
    h, context, _ = make_rows(4)
    gate = jnp.array([0.0, 1.0, 1.0, 0.0])
    w = trees.layer_slice(LAYERS, 0)

    def loss(combine):
        return lambda gate, h, w: jnp.sum(jnp.sin(combine(gate, h, block(w, h, context))))

    def interpolate(gate, h, new):
        return h + gate[:, None, None] * (new - h)

    ours = jax.grad(loss(choose), argnums=(0, 1, 2))(gate, h, w)
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
