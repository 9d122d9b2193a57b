import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dials_jax.skipping.routed import gumbel_votes, straight_through_threshold


def test_votes_are_one_hot_and_follow_the_noisy_logits():
    logits = jax.random.normal(jax.random.key(0), (50, 2))
    gumbel = jax.random.gumbel(jax.random.key(1), (50, 2))
    for temperature in (0.5, 1.0, 3.0):  # the temperature does not change the votes
        votes = gumbel_votes(gumbel, logits, temperature)
        expected = np.eye(2)[np.argmax(logits + gumbel, axis=-1)]
        np.testing.assert_allclose(votes, expected, atol=1e-6)


def test_initial_biases_skip_as_often_as_a_sigmoid_of_minus_3():
    n = 40_000
    gumbel = jax.random.gumbel(jax.random.key(0), (n, 2))
    votes = gumbel_votes(gumbel, jnp.broadcast_to(jnp.array([0.0, 3.0]), (n, 2)), 1.0)
    share = float(jnp.mean(votes[:, 0]))
    expected = 1 / (1 + np.exp(3))  # 4.74 %
    assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / n)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_gradient_of_votes_is_that_of_the_softmax(temperature):
    logits, gumbel = jnp.array([0.2, 0.9]), jnp.array([0.5, 0.1])
    # soft_0 = sigmoid(((0.2 + 0.5) - (0.9 + 0.1)) / T); d soft_0 / d logit_0 = soft_0 soft_1 / T.
    soft = 1 / (1 + np.exp(0.3 / temperature))
    slope = soft * (1 - soft) / temperature
    jacobian = jax.jacobian(lambda x: gumbel_votes(gumbel, x, temperature))(logits)
    np.testing.assert_allclose(jacobian, [[slope, -slope], [-slope, slope]], rtol=1e-5)


def test_threshold_is_strict():
    shares = jnp.array([0.0, 1 / 10, 2 / 20, 3 / 30, 0.1001, 1.0])
    np.testing.assert_array_equal(straight_through_threshold(shares, 0.1), [0, 0, 0, 0, 1, 1])
    np.testing.assert_array_equal(straight_through_threshold(jnp.array([0.0, 0.01]), 0.0), [0, 1])


def test_threshold_passes_gradients_through():
    slopes = jax.vmap(jax.grad(lambda share: straight_through_threshold(share, 0.1)))
    np.testing.assert_array_equal(slopes(jnp.array([0.0, 0.05, 0.1, 0.9])), [1, 1, 1, 1])
