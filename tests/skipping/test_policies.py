import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dials_jax import trees
from dials_jax.errors import InputError
from dials_jax.nn.policy import Denoising, check_policy, policy_flops, policy_name
from dials_jax.skipping.flops import router_flops
from dials_jax.skipping.policies import Random, Static
from dials_jax.skipping.routed import Routed, StochasticRouted

L = 12


def denoising(num_rows, step=0, seed=0):
    keys = jax.random.split(jax.random.key(seed), num_rows)
    return Denoising(jnp.ones((num_rows, 4), bool), jnp.asarray(step), keys)


def random_plan(k, **which):
    return np.asarray(Random(k).prepare(L, denoising(6, **which)))


def test_static_skips_the_layers_it_names():
    plan = Static((7, 2)).prepare(L, denoising(1))
    np.testing.assert_array_equal(np.flatnonzero(~plan), [2, 7])
    assert Static((7, 2)) == Static([2, 7, 7])  # one program for both


@pytest.mark.parametrize("layer", [-1, L])
def test_static_refuses_a_layer_that_does_not_exist(layer):
    with pytest.raises(InputError, match=f"layer {layer} does not exist.*0 to {L - 1}"):
        Static((layer,)).prepare(L, denoising(1))


@pytest.mark.parametrize("number", [0.25, True, "3", (3,), 2**40, np.int64(-1)])
def test_random_skips_whole_layers(number):
    with pytest.raises(InputError, match=r"num_skipped=.* must "):
        Random(number)


def test_static_skips_whole_layers(untyped):
    with pytest.raises(InputError, match=r"layers=1\.7 must be an integer"):
        Static((3, 1.7))


@pytest.mark.parametrize("k", [0, 1, 5, L])
def test_random_skips_exactly_k_layers_of_every_row(k):
    for step in range(3):
        np.testing.assert_array_equal((~random_plan(k, step=step)).sum(axis=0), [k] * 6)


def test_random_draws_anew_for_every_row_and_step():
    plan = random_plan(4)
    assert len({bytes(row) for row in plan.T}) > 1
    assert (plan != random_plan(4, step=1)).any()
    assert (plan != random_plan(4, seed=1)).any()
    np.testing.assert_array_equal(plan, random_plan(4))


def test_random_draws_do_not_depend_on_the_batch():
    batch = denoising(6)
    for i in (0, 5):
        alone = batch._replace(sequence_keys=batch.sequence_keys[i : i + 1])
        np.testing.assert_array_equal(Random(4).prepare(L, alone)[:, 0], random_plan(4)[:, i])


def test_random_skips_every_layer_alike():
    keys = jax.random.split(jax.random.key(0), 4000)
    plan = Random(3).prepare(L, Denoising(jnp.ones((4000, 1), bool), jnp.asarray(0), keys))
    rate, expected = np.mean(~np.asarray(plan), axis=1), 3 / L
    assert np.abs(rate - expected).max() < 5 * np.sqrt(expected * (1 - expected) / 4000)


def test_routers_of_another_depth_are_refused(model, routers):
    shallow = jax.tree.map(lambda x: x[:-1], routers)
    for policy in (Routed(shallow), StochasticRouted(shallow, 0.1, 1.0)):
        with pytest.raises(InputError, match="3 layers and the model 4"):
            policy.prepare(model.num_layers, denoising(1))


def test_only_routers_cost_flops(cfg, routers):
    for policy in (Routed(routers), Routed(trees.unstack(routers))):
        assert policy_flops(policy, cfg, 3) == router_flops(cfg, 3, 8) > 0
    for policy in (None, Static((1,)), Random(1)):
        assert policy_flops(policy, cfg, 3) == 0


def test_policies_have_the_names_of_reports(routers):
    policies = (None, Static((1,)), Random(1), Routed(routers))
    assert [policy_name(p) for p in policies] == ["full", "static", "random", "routed"]


# -------------------------------------------------------------------------------- training gates


@jax.jit
def gate_of(policy, plan, h, masked, keys):
    return policy.gate(plan, h, Denoising(masked, jnp.asarray(0), keys))


def stochastic_gate(routers, keys, masked, threshold=0.3, h=None):
    policy = StochasticRouted(routers, threshold, 1.0)
    plan = policy.prepare(4, Denoising(masked, jnp.asarray(0), keys))
    plan = jax.tree.map(lambda x: np.asarray(x)[1], plan)
    h = jax.random.normal(jax.random.key(5), (len(keys), 16, 32)) if h is None else h
    return gate_of(policy, plan, h, masked, keys)


def test_training_gates_are_0_or_1_and_1_without_masked_tokens(routers):
    keys = jax.random.split(jax.random.key(0), 20)
    masked = np.arange(16)[None] < np.arange(20)[:, None]
    gates = np.asarray(stochastic_gate(routers, keys, masked))
    assert set(gates.round(6)) == {0.0, 1.0}
    assert gates[0] == 1.0


def test_training_gates_of_a_row_do_not_depend_on_its_batch(routers):
    keys = jax.random.split(jax.random.key(0), 8)
    masked = np.ones((8, 16), bool)
    h = jax.random.normal(jax.random.key(5), (8, 16, 32))
    gates = stochastic_gate(routers, keys, masked, 0.5, h)
    for i in (0, 7):
        only = slice(i, i + 1)
        alone = stochastic_gate(routers, keys[only], masked[only], 0.5, h[only])
        np.testing.assert_allclose(alone[0], gates[i])


def test_every_layer_draws_its_own_noise(routers):
    keys = jax.random.split(jax.random.key(0), 30)
    policy = StochasticRouted(routers, 0.5, 1.0)
    h, masked = np.ones((30, 16, 32), np.float32), np.ones((30, 16), bool)
    plan = policy.prepare(4, Denoising(masked, jnp.asarray(0), keys))
    fair = {**jax.tree.map(lambda x: np.asarray(x)[0], routers), "vote": np.zeros((8, 2))}
    first, second = (
        gate_of(policy, plan._replace(router=fair, layer=i), h, masked, keys) for i in (0, 1)
    )
    assert (np.asarray(first) != np.asarray(second)).any()


def test_a_policy_with_the_old_name_of_prepare_is_told_the_new_one():
    class Old:
        def plan(self, num_layers, denoising):
            return None

        def gate(self, plan, h, denoising):
            return np.True_

    with pytest.raises(InputError, match=r"Old\.plan is now `Old\.prepare`; rename"):
        check_policy(Old())
