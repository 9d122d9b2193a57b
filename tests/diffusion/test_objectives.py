import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dials_jax.config import ObjectiveConfig
from dials_jax.diffusion.objectives import (
    causal_weights,
    dials_loss,
    diffusion_weights,
    masked_log_probs,
    next_tokens,
    skip_rate,
)


def test_log_probs_by_hand():
    # Row of logits (0, ln 3): probabilities 1/4 and 3/4. The second position is not masked.
    logits = jnp.array([[[0.0, np.log(3)], [5.0, 1.0], [2.0, 2.0]]])
    tokens, masked = jnp.array([[1, 0, 0]]), jnp.array([[True, False, True]])
    expected = [[np.log(0.75), 0, np.log(0.5)]]
    np.testing.assert_allclose(masked_log_probs(logits, tokens, masked), expected, rtol=1e-6)


def test_diffusion_weights_by_hand():
    # An answer of 4 tokens, 2 of them masked with p = 0.5: each nat counts 1 / 4 / 0.5.
    masked = jnp.array([[False, True, False, True, False]])
    answer = jnp.array([[False, True, True, True, True]])
    weights = diffusion_weights(masked, answer, jnp.array([2.0]))
    np.testing.assert_allclose(weights, [[0, 0.5, 0, 0.5, 0]])


def test_a_row_without_an_answer_costs_nothing():
    nothing = jnp.zeros((1, 3), bool)
    np.testing.assert_array_equal(
        diffusion_weights(nothing, nothing, jnp.array([1e3])), 0 * nothing
    )
    np.testing.assert_array_equal(causal_weights(nothing), 0 * nothing)


def test_the_next_tokens_by_hand():
    """Padding on the left predicts nothing, the first answer token of a prompt-less row neither."""
    tokens = jnp.array([[5, 6, 7, 8], [0, 5, 6, 7]])
    answer = jnp.array([[True, True, True, True], [False, True, True, False]])
    valid = jnp.array([[True, True, True, True], [False, True, True, True]])
    targets, counted = next_tokens(tokens, answer, valid)
    np.testing.assert_array_equal(targets[:, :3], tokens[:, 1:])
    np.testing.assert_array_equal(counted, [[1, 1, 1, 0], [0, 1, 0, 0]])
    np.testing.assert_array_equal(next_tokens(tokens, answer, None)[1][1], [1, 1, 0, 0])
    np.testing.assert_allclose(causal_weights(counted), [[1 / 3, 1 / 3, 1 / 3, 0], [0, 1, 0, 0]])


@pytest.mark.parametrize("scaled, expected", [(True, 4.2), (False, 3.6)])
def test_the_dials_loss_by_hand(scaled, expected):
    # 6 nats / 4 answer tokens = 1.5; lambda 2 * |0.2 - 0.5| = 0.6; p = 0.5 divides both, or one.
    cfg = ObjectiveConfig(skip_weight=2.0, target_skip_rate=0.5, scale_skip_by_mask_ratio=scaled)
    numbers = (jnp.array([x]) for x in (6.0, 4, 3, 0.2, 0.5))
    np.testing.assert_allclose(dials_loss(*numbers, cfg), [expected], rtol=1e-6)


def test_the_skip_rate_is_the_mean_over_layers_of_each_sequence():
    gates = jnp.array([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
    np.testing.assert_allclose(skip_rate(gates), [0.25, 0.75])


@pytest.mark.parametrize("scaled", [True, False])
def test_a_row_without_masked_tokens_gives_neither_loss_nor_gradient(scaled):
    cfg = ObjectiveConfig(scale_skip_by_mask_ratio=scaled)

    def loss(alpha):
        nothing, count = jnp.zeros(2), jnp.array([0, 1])
        return dials_loss(nothing, count + 1, count, alpha, jnp.full(2, 0.001), cfg)

    alpha = jnp.array([0.1, 0.1])
    assert loss(alpha)[0] == 0 and loss(alpha)[1] > 0
    slopes = jax.grad(lambda x: loss(x).sum())(alpha)
    assert slopes[0] == 0 and slopes[1] < 0  # fewer skips than wanted: more lower the loss
