import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dials_jax.config import ObjectiveConfig
from dials_jax.diffusion.objectives import dials_loss, diffusion_loss, masked_log_probs


def test_log_probs_by_hand():
    # Row of logits (0, ln 3): probabilities 1/4 and 3/4. The second position is not masked.
    logits = jnp.array([[[0.0, np.log(3)], [5.0, 1.0], [2.0, 2.0]]])
    tokens, masked = jnp.array([[1, 0, 0]]), jnp.array([[True, False, True]])
    expected = [[np.log(0.75), 0, np.log(0.5)]]
    np.testing.assert_allclose(masked_log_probs(logits, tokens, masked), expected, rtol=1e-6)


def test_diffusion_loss_by_hand():
    # 6 nats over an answer of 4 tokens, masked with p = 0.5: 6 / 4 / 0.5 = 3.
    loss = diffusion_loss(jnp.array([6.0]), jnp.array([4]), jnp.array([0.5]))
    np.testing.assert_allclose(loss, [3.0])


def test_a_row_without_an_answer_costs_nothing():
    loss = diffusion_loss(jnp.array([0.0]), jnp.array([0]), jnp.array([0.001]))
    np.testing.assert_array_equal(loss, [0.0])


@pytest.mark.parametrize("scaled, expected", [(True, 4.2), (False, 3.6)])
def test_dials_loss_by_hand(scaled, expected):
    # CE part 3, as above. Skip part: lambda 2 * |0.2 - 0.5| = 0.6, divided by p = 0.5 if scaled.
    cfg = ObjectiveConfig(skip_weight=2.0, target_skip_rate=0.5, scale_skip_by_mask_ratio=scaled)
    loss = dials_loss(
        jnp.array([6.0]), jnp.array([4]), jnp.array([3]), jnp.array([0.5]), jnp.array([0.2]), cfg
    )
    np.testing.assert_allclose(loss, [expected], rtol=1e-6)


@pytest.mark.parametrize("scaled", [True, False])
def test_a_row_without_masked_tokens_gives_neither_loss_nor_gradient(scaled):
    cfg = ObjectiveConfig(scale_skip_by_mask_ratio=scaled)

    def loss(skip_rate):
        return dials_loss(
            jnp.zeros(2), jnp.array([4, 4]), jnp.array([0, 1]), jnp.full(2, 0.001), skip_rate, cfg
        )

    skip_rate = jnp.array([0.1, 0.1])
    assert loss(skip_rate)[0] == 0 and loss(skip_rate)[1] > 0
    slopes = jax.grad(lambda x: loss(x).sum())(skip_rate)
    assert slopes[0] == 0 and slopes[1] < 0  # fewer skips than wanted: more lower the loss
