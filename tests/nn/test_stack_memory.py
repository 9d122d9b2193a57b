"""Layers with a memory, layers that must run, and output positions."""

import re
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dials_jax import trees
from dials_jax.nn import gates as gates_module
from dials_jax.nn.kv import gather
from dials_jax.nn.stack import Layer, run_stack
from dials_jax.skipping.policies import Random, Static
from tests.nn.toy import LAYER, LAYERS, D, Given, L, T, block, jitted, make_rows, run


def run_with_memory(policy, rows, executor, unrolled=False, span=None, layers=LAYERS):
    """Hidden states, gates, and the memory before and after, [layers that run, B, D]."""
    first, last = span or (0, trees.num_layers(layers))
    shape = (last - first, rows[0].shape[0], D)
    before = {"mean": jax.random.normal(jax.random.key(8), shape)}
    layers, memory = (trees.unstack(x) if unrolled else x for x in (layers, before))
    h, context, denoising = rows
    out = jitted(layers, h, context, policy, denoising, memory, executor=executor, span=span)
    after = jnp.stack([m["mean"] for m in out.cache_state]) if unrolled else out.cache_state["mean"]
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
    for actual, other in zip(out, expected, strict=True):
        np.testing.assert_allclose(actual, other, atol=1e-5)
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
    for actual, other in zip(out, expected, strict=True):
        np.testing.assert_allclose(actual, other, atol=1e-5)


def test_rows_too_few_to_save_time_are_computed_together(monkeypatch):
    """One choice a layer, not three, and the same results."""
    rows = make_rows(6)
    gates = jax.random.bernoulli(jax.random.key(3), 0.3, (L, 6)).at[1].set(False)
    expected = run_with_memory(Given(gates), rows, "select")
    jitted.clear_cache()
    for fewest, choices in ((1, 3 * L), (2 * T, 3 * L), (6 * T, L), (128, L)):
        monkeypatch.setattr(gates_module, "FEWEST_TOKENS", fewest)
        layers, memory = trees.unstack(LAYERS), trees.unstack({"mean": jnp.zeros((L, 6, D))})
        args = (layers, rows[0], rows[1], Given(gates), rows[2], memory)
        program = jitted.lower(*args, executor="compact").compile().as_text()
        assert len(re.findall(r" conditional\(", program)) == choices
        out = run_with_memory(Given(gates), rows, "compact", unrolled=True)
        for actual, other in zip(out, expected, strict=True):
            np.testing.assert_allclose(actual, other, atol=1e-5)
        jitted.clear_cache()


# ---------------------------------------------------------- output_positions, and force_execute


@partial(jax.jit, static_argnames="executor")
def jitted_outputs(
    layers, h, context, policy, denoising, memory, positions, force_execute, *, executor
):
    return run_stack(
        LAYER, layers, h, context._replace(output_positions=positions), policy,
        denoising._replace(prompt_length=0, force_execute=force_execute),
        cache_state=memory, executor=executor,
    )  # fmt: skip


def run_outputs(policy, rows, executor, unrolled, positions=None, force_execute=None):
    """Hidden states, gates and memory, layer by layer."""
    (h, context, denoising), layers = rows, LAYERS
    memory = {"mean": jax.random.normal(jax.random.key(8), (L, h.shape[0], D))}
    if unrolled:
        layers, memory = trees.unstack(layers), trees.unstack(memory)
    out = jitted_outputs(
        layers,
        h,
        context,
        policy,
        denoising,
        memory,
        positions,
        force_execute,
        executor=executor,
    )
    after = jnp.stack([m["mean"] for m in out.cache_state]) if unrolled else out.cache_state["mean"]
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
def test_output_positions_are_those_of_the_whole(gates, executor, unrolled):
    rows = make_rows(gates.shape[1] if gates.ndim == 2 else 3)
    positions = (jnp.arange(2) + jnp.arange(rows[0].shape[0])[:, None]) % T  # others per sequence
    expected, gates_of_all, memory = run_outputs(Given(gates), rows, "select", False)
    h, gates, after = run_outputs(Given(gates), rows, executor, unrolled, positions)
    np.testing.assert_allclose(h, gather(jnp.asarray(expected), positions), atol=1e-5)
    np.testing.assert_array_equal(gates, gates_of_all)
    np.testing.assert_allclose(after, memory, atol=1e-5)  # of all tokens


@pytest.mark.parametrize("unrolled", [False, True])
@pytest.mark.parametrize("policy", [None, Static((1, 3))])
def test_output_positions_without_branches(policy, unrolled):
    rows = make_rows(3)
    positions = jnp.array([[0, 4], [3, 1], [2, 2]])
    expected, _, memory = run_outputs(policy, rows, "auto", False)
    h, _, after = run_outputs(policy, rows, "auto", unrolled, positions)
    np.testing.assert_allclose(h, gather(jnp.asarray(expected), positions), atol=1e-5)
    np.testing.assert_allclose(after, memory, atol=1e-5)


def test_the_last_block_is_asked_for_the_output_positions_only():
    asked = []

    def block_of(params, h, context):
        positions = context.output_positions
        asked.append(None if positions is None else positions.shape)
        return block(params, h, context)

    h, context, denoising = make_rows(3)
    positions = jnp.zeros((3, 2), int)
    layers = trees.unstack(LAYERS)
    context = context._replace(output_positions=positions)
    out = run_stack(Layer(block_of), layers, h, context, None, denoising)
    assert asked == [None, None, None, (3, 2)] and out.h.shape == (3, 2, D)


@pytest.mark.parametrize("unrolled", [False, True])
@pytest.mark.parametrize("executor", ["select", "compact"])
def test_layers_that_must_run_do(executor, unrolled):
    """All but those that are skipped at every step, in either layout."""
    rows = make_rows(3)
    expected = run_outputs(None, rows, "select", False)
    for policy in (Given(GATES), Given(GATES[:, 1]), Random(2)):
        out = run_outputs(policy, rows, executor, unrolled, force_execute=jnp.array(True))
        for actual, of_all in zip(out, expected, strict=True):
            np.testing.assert_allclose(actual, of_all, atol=1e-5)
        free = run_outputs(policy, rows, executor, unrolled)
        out = run_outputs(policy, rows, executor, unrolled, force_execute=jnp.array(False))
        chex.assert_trees_all_equal(out, free)
        assert not free[1].all()
    _, gates, _ = run_outputs(
        Static((1, 3)), rows, executor, unrolled, force_execute=jnp.array(True)
    )
    np.testing.assert_array_equal(gates, [[True] * 3, [False] * 3] * 2)


@pytest.mark.parametrize("unrolled", [False, True])
def test_over_a_memory_layers_of_one_shape_are_traced_once_however_many_there_are(unrolled):
    traced = []

    def project(*args):
        traced.append(args)
        return LAYER.project(*args)

    h, context, denoising = make_rows(2)
    memory = {"mean": jnp.zeros((L, 2, D))}
    layers = trees.unstack(LAYERS) if unrolled else LAYERS
    memory = trees.unstack(memory) if unrolled else memory
    layer = LAYER._replace(project=project)
    run_stack(layer, layers, h, context, None, denoising, cache_state=memory)
    assert len(traced) == 1
