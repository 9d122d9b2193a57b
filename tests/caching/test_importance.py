"""The importance of ES-dLLM's tokens, by hand: which terms it has, and when."""

import jax.numpy as jnp
import numpy as np
import pytest

from dials_jax.caching.early_skip.importance import (
    fixed_bonus,
    importance,
    indicator_change,
    num_kept,
)

CONFIDENCE, CHANGE = np.array([[0.0, 0.5, 0.2, 0.4]]), np.array([[1.0, 0.0, 0.1, 0.6]])
NOTHING = np.zeros((1, 4))


@pytest.mark.parametrize(
    "alpha, expected",
    [
        (0.0, [1.0, 0.0, 0.1, 0.6]),  # the change alone, and nothing for the most confident
        (0.25, [0.75, 2.125, 0.125, 2.55]),
        (1.0, [0.0, 2.5, 0.2, 2.4]),
    ],
)
def test_alpha_weighs_confidence_against_change(alpha, expected):
    score = importance(*map(jnp.asarray, (CONFIDENCE, CHANGE, NOTHING)), alpha, None)
    np.testing.assert_allclose(score, [expected], rtol=1e-6)


def test_who_is_not_active_is_neither_chosen_nor_among_the_most_confident():
    active = jnp.array([[True, False, True, True]])
    score = importance(*map(jnp.asarray, (CONFIDENCE, CHANGE, NOTHING)), 0.25, active)
    np.testing.assert_allclose(score, [[0.75, -np.inf, 2.125, 2.55]], rtol=1e-6)


@pytest.mark.parametrize("alpha, of_revealed", [(0.5, 3.0), (1.0, 0.0)])
def test_the_leftmost_masked_and_the_last_revealed_tokens_stay(alpha, of_revealed):
    masked = jnp.array([[False, True, False, True], [False] * 4])
    revealed = jnp.array([[False, False, True, False], [True, False, False, False]])
    bonus = fixed_bonus(masked, revealed, alpha)
    np.testing.assert_array_equal(bonus, [[0, 5, of_revealed, 0], [of_revealed, 0, 0, 0]])


def test_the_change_is_relative_to_the_old_value_and_never_above_one():
    old = jnp.array([[[3.0, 4.0], [3.0, 4.0], [6.0, 8.0]]])
    small = old + jnp.array([[[1.0, 0.0], [0.0, 2.0], [1.0, -3.0]]])
    size = np.sqrt(12.5)
    expected = [[0.5 / size, 1 / size, 2 / (2 * size)]]
    np.testing.assert_allclose(indicator_change(small, old, None), expected, rtol=1e-5)
    large = old + jnp.array([[[10.0, 10.0], [5.0, 5.0], [0.0, 0.0]]])
    np.testing.assert_allclose(indicator_change(large, old, None), [[1.0, 0.5, 0.0]], rtol=1e-5)
    active = jnp.array([[False, True, True]])  # 5 / size > 1 is now the largest that counts
    change = indicator_change(large, old, active)
    np.testing.assert_allclose(change[0, 1:], [1.0, 0.0], rtol=1e-5)


@pytest.mark.parametrize(
    "proportion, revealed, expected",
    [(1.0, 1, 8), (0.5, 1, 4), (0.3, 1, 3), (0.25, 1, 3), (0.25, 3, 5), (0.25, 30, 8)],
)
def test_two_more_go_on_than_were_revealed_but_no_more_than_the_block(
    proportion, revealed, expected
):
    assert num_kept(proportion, 8, np.int64(revealed)) == expected
    np.testing.assert_array_equal(num_kept(proportion, 8, jnp.array([revealed])), [expected])
