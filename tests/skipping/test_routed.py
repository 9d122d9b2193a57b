from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dials_jax.config import RouterConfig
from dials_jax.nn.policy import Denoising
from dials_jax.skipping.routed import (
    SKIP,
    Routed,
    RoutedLayer,
    advice_if_idle,
    apply_router,
    gumbel_noise_scale,
    gumbel_votes,
    skip_share,
    straight_through_threshold,
    votes_to_skip,
)
from tests.conftest import jitted_init_routers, random_routers, small_config

D, T = 8, 10
jitted_votes = jax.jit(gumbel_votes, static_argnums=2)


@pytest.fixture(scope="module")
def fresh():
    return jitted_init_routers(D, 3, RouterConfig(d_hidden=4), jax.random.key(0))


def h_of(num_rows, seed=0):
    return jax.random.normal(jax.random.key(seed), (num_rows, T, D))


def voting_router():
    """A router whose token votes to skip if its first feature is positive; ties at 0 count so."""
    router = layer_of(jitted_init_routers(D, 1, RouterConfig(d_hidden=2), jax.random.key(0)), 0)
    down = np.zeros((D, 2), np.float32)
    down[0] = [1.0, -1.0]
    vote = np.array([[1.0, 0.0], [0.0, 1.0]], np.float32)
    return {**router, "down": down, "vote": vote, "vote_bias": np.zeros(2, np.float32)}


def layer_of(routers, layer):
    return jax.tree.map(lambda x: np.asarray(x)[layer], routers)


@partial(jax.jit, static_argnums=4)
def jitted_gate(router, h, masked, threshold, votes="hard"):
    prepared = RoutedLayer(router, jnp.float32(threshold))
    policy = Routed(None, votes=votes)
    return policy.gate(prepared, h, Denoising(masked, jnp.asarray(0), None))


def gates_of(first_features, masked, threshold=0.1):
    h = np.zeros((1, T, D), np.float32)
    h[0, :, 0] = first_features
    h[:, :, 1] = 1.0  # keeps the norm away from 0
    return bool(jitted_gate(voting_router(), h, np.asarray(masked)[None], threshold)[0])


def test_routers_start_by_voting_to_execute(fresh):
    assert not fresh["vote"].any()
    np.testing.assert_array_equal(fresh["vote_bias"], [[0, 3]] * 3)
    assert len({bytes(np.asarray(layer)) for layer in fresh["down"]}) == 3  # independent draws
    logits = jax.jit(apply_router)(layer_of(fresh, 1), h_of(2))
    np.testing.assert_array_equal(logits, np.broadcast_to([0, 3], (2, T, 2)))


def test_router_by_hand():
    key = jax.random.key(0)
    router = layer_of(jitted_init_routers(D, 1, RouterConfig(d_hidden=4), key), 0)
    leaves, structure = jax.tree.flatten(router)
    keys = jax.random.split(key, len(leaves))
    leaves = [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    router = jax.tree.unflatten(structure, leaves)
    h = np.asarray(h_of(2))
    x = h / np.sqrt((h**2).mean(-1, keepdims=True) + 1e-5) * router["norm"]["scale"]
    x = x @ router["down"] + router["down_bias"]
    expected = x / (1 + np.exp(-x)) @ router["vote"] + router["vote_bias"]
    found = jax.jit(apply_router)(router, h)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_votes_are_for_the_higher_logit(seed):
    routers = random_routers(small_config(d_model=D, num_layers=1), seed)
    router = layer_of(routers, 0)
    router["vote_bias"] = jax.random.normal(jax.random.key(seed), (2,))
    h = h_of(4, seed)
    logits, votes = (np.asarray(jax.jit(fn)(router, h)) for fn in (apply_router, votes_to_skip))
    np.testing.assert_array_equal(votes, np.argmax(logits, axis=-1) == SKIP)
    assert 0 < votes.mean() < 1


def test_share_counts_votes_of_masked_tokens_only():
    votes = jnp.array([[1.0, 1, 0, 0], [1, 1, 1, 1], [0, 1, 1, 1]])
    masked = jnp.array([[True, False, True, False], [False] * 4, [True, False, False, False]])
    np.testing.assert_array_equal(skip_share(votes, masked), [0.5, 0, 0])


def test_only_masked_tokens_vote():
    skip_votes = [1.0] * 5 + [-1.0] * 5
    assert not gates_of(skip_votes, [True] * 5 + [False] * 5)
    assert gates_of(skip_votes, [False] * 5 + [True] * 5)


def test_without_masked_tokens_the_layer_runs():
    assert gates_of([1.0] * T, [False] * T)


def test_one_vote_in_ten_does_not_exceed_a_tenth():
    votes = [1.0] + [-1.0] * 9
    assert gates_of(votes, [True] * T)
    assert not gates_of(votes, [True] * 9 + [False])  # one in nine does


def test_equal_logits_vote_to_skip():
    assert not gates_of([0.0] * T, [True] * T)


def test_padding_never_votes(lively, cfg, routers):
    """Among 16 sequences, four of [MASK] as padding would change the outcome of some vote."""
    num = 16
    tokens = np.random.default_rng(0).integers(2, 60, (num, 6))
    tokens[:, 3:] = cfg.mask_id
    padded = np.concatenate([np.full((num, 4), cfg.mask_id), tokens], axis=1)
    valid = np.broadcast_to(np.arange(10) >= 4, (num, 10))
    policy = Routed(routers, 0.4)
    alone = lively.apply(tokens, np.ones((num, 6), bool), policy, executor="select")
    found = lively.apply(padded, valid, policy, executor="select")
    np.testing.assert_array_equal(found.gates, alone.gates)
    assert alone.gates.any() and not alone.gates.all()


# ------------------------------------------------------------------------------------ soft votes


def test_soft_votes_are_the_probabilities_of_a_vote_under_noise(fresh):
    bias = np.array([0.0, 1.2], np.float32)
    router = {**layer_of(fresh, 0), "vote_bias": bias}
    votes = jax.jit(votes_to_skip, static_argnums=2)(router, h_of(2), "soft")
    gumbel = jax.random.gumbel(jax.random.key(0), (40_000, 2))
    sampled = jitted_votes(gumbel, np.broadcast_to(bias, gumbel.shape), 1.0)
    np.testing.assert_allclose(votes, 1 / (1 + np.exp(1.2)), rtol=1e-6)
    assert float(jnp.mean(sampled[:, SKIP])) == pytest.approx(float(votes[0, 0]), abs=0.01)


@pytest.mark.parametrize("threshold", [0.0, 0.25, 0.5])
def test_saturated_soft_votes_gate_as_hard_ones(threshold):
    router = layer_of(random_routers(small_config(d_model=D, num_layers=1), 3), 0)
    router["vote"] = 1e4 * router["vote"]
    h, masked = h_of(40), jax.random.bernoulli(jax.random.key(1), 0.6, (40, T))
    hard, soft = (jitted_gate(router, h, masked, threshold, votes) for votes in ("hard", "soft"))
    np.testing.assert_array_equal(hard, soft)
    assert hard.any() and not hard.all()


def test_undecided_votes_count_in_part():
    """A third of a vote exceeds a fourth, though no token would rather skip."""
    bias = np.log(np.array([1.0, 2.0], np.float32))
    router = {**voting_router(), "vote": np.zeros((2, 2), np.float32), "vote_bias": bias}
    masked = np.ones((1, T), bool)
    cases = ("hard", 0.25, True), ("soft", 0.25, False), ("soft", 0.4, True)
    for votes, threshold, runs in cases:
        assert bool(jitted_gate(router, h_of(1), masked, threshold, votes)[0]) == runs


def test_the_scale_of_the_noise_falls_in_a_line_and_stays_at_0():
    cfg = RouterConfig(anneal_steps=4)
    scales = [float(gumbel_noise_scale(cfg, jnp.int32(step))) for step in (0, 1, 4, 100)]
    assert scales == [1.0, 0.75, 0.0, 0.0]
    assert gumbel_noise_scale(RouterConfig(), jnp.int32(3)) is None


@pytest.mark.parametrize("layers_run, words", [(1.0, "never skips"), (0.997, "skips 0.3%")])
def test_an_idle_router_gets_advice(layers_run, words):
    assert words in advice_if_idle(layers_run) and "larger lambda" in advice_if_idle(layers_run)
    assert advice_if_idle(0.95) == ""


# ------------------------------------------------------------------------- Gumbel straight-through


def test_votes_are_one_hot_and_follow_the_noisy_logits():
    logits = jax.random.normal(jax.random.key(0), (50, 2))
    gumbel = jax.random.gumbel(jax.random.key(1), (50, 2))
    for temperature in (0.5, 1.0, 3.0):  # the temperature does not change the votes
        votes = jitted_votes(gumbel, logits, temperature)
        expected = np.eye(2)[np.argmax(logits + gumbel, axis=-1)]
        np.testing.assert_allclose(votes, expected, atol=1e-6)


def test_initial_biases_skip_as_often_as_a_sigmoid_of_minus_3():
    n = 40_000
    gumbel = jax.random.gumbel(jax.random.key(0), (n, 2))
    votes = jitted_votes(gumbel, np.tile(np.float32([0.0, 3.0]), (n, 1)), 1.0)
    share = float(np.mean(votes[:, 0]))
    expected = 1 / (1 + np.exp(3))  # 4.74 %
    assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / n)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_gradient_of_votes_is_that_of_the_softmax(temperature):
    logits, gumbel = jnp.array([0.2, 0.9]), jnp.array([0.5, 0.1])
    # soft_0 = sigmoid(((0.2 + 0.5) - (0.9 + 0.1)) / T); d soft_0 / d logit_0 = soft_0 soft_1 / T.
    soft = 1 / (1 + np.exp(0.3 / temperature))
    slope = soft * (1 - soft) / temperature
    jacobian = jax.jit(jax.jacobian(lambda x: gumbel_votes(gumbel, x, temperature)))(logits)
    np.testing.assert_allclose(jacobian, [[slope, -slope], [-slope, slope]], rtol=1e-5)


def test_threshold_is_strict():
    shares = jnp.array([0.0, 1 / 10, 2 / 20, 3 / 30, 0.1001, 1.0])
    np.testing.assert_array_equal(straight_through_threshold(shares, 0.1), [0, 0, 0, 0, 1, 1])
    np.testing.assert_array_equal(straight_through_threshold(jnp.array([0.0, 0.01]), 0.0), [0, 1])


def test_threshold_passes_gradients_through():
    slopes = jax.jit(jax.vmap(jax.grad(lambda share: straight_through_threshold(share, 0.1))))
    np.testing.assert_array_equal(slopes(jnp.array([0.0, 0.05, 0.1, 0.9])), [1, 1, 1, 1])
