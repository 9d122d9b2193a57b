"""What a policy may say beside its gates: a state from layer to layer, a name, FLOPs of its own."""

from dataclasses import dataclass

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dials_jax import trees
from dials_jax.nn.policy import policy_flops, policy_name, static_gates
from dials_jax.nn.stack import run_stack
from dials_jax.skipping.policies import Random, Static
from tests.nn.toy import LAYER, LAYERS, Context, Given, L, block, make_rows


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Resting:
    """Skips a layer after one that ran, unless the stream is large; counts the layers that ran."""

    name = "resting"

    def prepare(self, num_layers, denoising):
        return np.arange(num_layers)

    def init_state(self, h, denoising):
        return {"ran": h[:, 0, 0] > 0, "count": jnp.zeros(h.shape[0], int)}

    def gate(self, layer, h, denoising, state):
        gate = ~state["ran"] | (jnp.max(h[:, -1], axis=-1) > 2.3 - 0.1 * layer)
        return gate, {"ran": gate, "count": state["count"] + gate}

    def flops(self, cfg, num_tokens):
        return 3 * num_tokens


def by_hand(rows):
    """Hidden states, gates and state by the definition, layer after layer."""
    (h, context, denoising), policy = rows, Resting()
    state, gates = policy.init_state(h, denoising), []
    for i in range(L):
        gate, state = policy.gate(i, h, denoising, state)
        h = jnp.where(gate[:, None, None], block(trees.layer_slice(LAYERS, i), h, context), h)
        gates.append(gate)
    return np.asarray(h), np.asarray(gates), np.asarray(state["count"])


def stack(rows, executor, unrolled, policy_state=None, span=None):
    layers = trees.unstack(LAYERS) if unrolled else LAYERS
    h, context, denoising = rows

    @jax.jit
    def run(layers, h):
        return run_stack(
            LAYER, layers, h, context, Resting(), denoising,
            executor=executor, policy_state=policy_state, span=span,
        )  # fmt: skip

    return run(layers, h)


@pytest.mark.parametrize("unrolled", [False, True])
@pytest.mark.parametrize("executor", ["select", "compact"])
def test_a_state_goes_from_layer_to_layer(executor, unrolled):
    rows = make_rows(5)
    h, gates, count = by_hand(rows)
    out = stack(rows, executor, unrolled)
    np.testing.assert_array_equal(out.gates, gates)
    np.testing.assert_array_equal(out.policy_state["count"], count)
    np.testing.assert_allclose(out.h, h, atol=1e-5)
    resting = gates[:-1] & ~gates[1:]
    assert resting.any() and (gates[:-1] & gates[1:]).any()  # both rules apply somewhere


@pytest.mark.parametrize("executor", ["cond", "auto"])
def test_a_state_is_that_of_a_sequence_alone(executor):
    h, context, denoising = batch = make_rows(5)
    _, gates, count = by_hand(batch)
    for i in range(5):
        only = slice(i, i + 1)
        alone = h[only], Context(context.valid[only]), denoising._replace(step=jnp.asarray(0))
        out = stack(alone, executor, unrolled=i % 2 == 0)
        np.testing.assert_array_equal(out.gates[:, 0], gates[:, i])
        assert out.policy_state["count"][0] == count[i]


@pytest.mark.parametrize("unrolled", [False, True])
def test_a_state_goes_from_span_to_span(unrolled):
    rows = make_rows(5)
    whole = stack(rows, "compact", unrolled)
    first = stack(rows, "compact", unrolled, span=(0, 2))
    second = stack((first.h, *rows[1:]), "compact", unrolled, first.policy_state, span=(2, L))
    np.testing.assert_array_equal(np.concatenate([first.gates, second.gates]), whole.gates)
    np.testing.assert_allclose(second.h, whole.h, atol=1e-6)
    chex.assert_trees_all_equal(second.policy_state, whole.policy_state)


def test_static_gates_are_known_before_a_program_runs():
    np.testing.assert_array_equal(static_gates(Static((1, 2)), 4), [True, False, False, True])
    assert static_gates(None, 4).all()
    assert static_gates(Random(1), 4) is None and static_gates(Resting(), 4) is None


def test_a_policy_has_a_name_and_flops_or_their_defaults(cfg):
    assert policy_name(Resting()) == "resting"
    assert policy_name(None) == "full"
    assert policy_name(Given(None)) == "Given"
    np.testing.assert_array_equal(policy_flops(Resting(), cfg, np.array([2.0, 5.0])), [6, 15])
    for plain in (None, Given(None)):
        np.testing.assert_array_equal(policy_flops(plain, cfg, np.array([2.0, 5.0])), [0, 0])
