import jax
import jax.numpy as jnp
import numpy as np

from dials_jax.diffusion.corruption import corrupt

B, T = 400, 60
KEYS = jax.random.split(jax.random.key(0), B)
masks = jax.jit(corrupt, static_argnames="min_ratio")
ANSWER = jnp.broadcast_to(jnp.arange(T) >= 10, (B, T))


def test_only_answer_positions_are_masked():
    masked, _ = masks(KEYS, ANSWER, min_ratio=1e-3)
    assert not (masked & ~ANSWER).any()
    assert np.asarray(masked.any(axis=0))[10:].all()


def test_ratios_are_uniform_between_the_smallest_and_1():
    _, ratio = masks(KEYS, ANSWER, min_ratio=0.2)
    assert ratio.min() >= 0.2 and ratio.max() <= 1
    # Mean and spread of U(0.2, 1), within 4 standard errors.
    assert abs(float(ratio.mean()) - 0.6) < 4 * (0.8 / 12**0.5) / B**0.5
    assert abs(float(ratio.std()) - 0.8 / 12**0.5) < 0.03


def test_the_realised_share_is_the_ratio_on_average():
    masked, ratio = masks(KEYS, ANSWER, min_ratio=1e-3)
    share = masked.sum(axis=1) / ANSWER.sum(axis=1)
    z = (share - ratio) / jnp.sqrt(ratio * (1 - ratio) / 50)  # binomial of 50 positions
    assert abs(float(z.mean())) < 4 / B**0.5
    assert 0.8 < float(z.std()) < 1.2
    assert (share != ratio).any()


def test_a_row_does_not_depend_on_the_rest_of_its_batch():
    masked, ratio = masks(KEYS[:5], ANSWER[:5], min_ratio=1e-3)
    alone, alone_ratio = masks(KEYS[3:4], ANSWER[3:4], min_ratio=1e-3)
    np.testing.assert_array_equal(alone[0], masked[3])
    assert alone_ratio[0] == ratio[3]
