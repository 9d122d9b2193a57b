import jax
import jax.numpy as jnp
import numpy as np

from dials_jax.diffusion.noise import corrupt

B, T = 400, 60
KEYS = jax.random.split(jax.random.key(0), B)
RATIO = jnp.linspace(0.001, 1, B)
ANSWER = jnp.broadcast_to(jnp.arange(T) >= 10, (B, T))
masks = jax.jit(corrupt)


def test_only_answer_positions_are_masked():
    masked = masks(KEYS, ANSWER, RATIO)
    assert not (masked & ~ANSWER).any()
    assert np.asarray(masked.any(axis=0))[10:].all()


def test_the_realised_share_is_the_ratio_on_average():
    masked = masks(KEYS, ANSWER, RATIO)
    share = masked.sum(axis=1) / ANSWER.sum(axis=1)
    inner = (RATIO > 0.02) & (RATIO < 0.98)
    z = ((share - RATIO) / jnp.sqrt(RATIO * (1 - RATIO) / 50))[inner]  # binomial of 50 positions
    assert abs(float(z.mean())) < 4 / z.size**0.5
    assert 0.8 < float(z.std()) < 1.2


def test_ratio_1_masks_every_answer_position():
    np.testing.assert_array_equal(masks(KEYS, ANSWER, jnp.ones(B)), ANSWER)


def test_a_row_does_not_depend_on_the_rest_of_its_batch():
    alone = masks(KEYS[3:4], ANSWER[3:4], RATIO[3:4])
    np.testing.assert_array_equal(alone[0], masks(KEYS, ANSWER, RATIO)[3])
