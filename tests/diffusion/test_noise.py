"""Noise levels, decided by the step and the sequence's number alone, and what they mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dials_jax.diffusion.noise import (
    bit_reversed_rank,
    corrupt,
    stratified,
    stratified_noise,
    uniform_noise,
)

N = 16


def places(seed, num_rows=N):
    return stratified(jax.random.key(seed), jnp.arange(num_rows), num_rows)


def test_lladas_ratios_are_uniform_between_the_smallest_and_1():
    keys = jax.random.split(jax.random.key(0), 400)
    noise = uniform_noise(keys, 0.2)
    assert noise.ratio.min() >= 0.2 and noise.ratio.max() <= 1
    # Mean and spread of U(0.2, 1), within 4 standard errors.
    assert abs(float(noise.ratio.mean()) - 0.6) < 4 * (0.8 / 12**0.5) / 400**0.5
    assert abs(float(noise.ratio.std()) - 0.8 / 12**0.5) < 0.03
    np.testing.assert_array_equal(noise.time, noise.ratio)
    np.testing.assert_allclose(noise.weight * noise.ratio, 1, rtol=1e-6)
    np.testing.assert_array_equal(uniform_noise(keys[3:4], 0.2).ratio, noise.ratio[3:4])


def test_one_place_lies_in_every_nth_of_the_batch():
    for seed in range(5):
        np.testing.assert_array_equal(np.sort(np.floor(places(seed) * N)), np.arange(N))


@pytest.mark.parametrize("num_rows", [1, 2, 7, 8, 12, 48, 64, 500])
def test_devices_get_as_much_noise(num_rows):
    """Each of the devices that share a batch as neighbours, and each of their microbatches."""
    order = np.asarray(bit_reversed_rank(jnp.arange(num_rows), num_rows))
    assert sorted(order) == list(range(num_rows))
    backwards = [int(f"{i:010b}"[::-1], 2) for i in range(num_rows)]
    np.testing.assert_array_equal(order, np.argsort(np.argsort(backwards)))
    ratios = np.asarray(places(0, num_rows))
    for devices in (2, 4):
        if num_rows % (4 * devices) == 0:
            for batch in (ratios, ratios[::2], ratios[3::4]):
                own = batch.reshape(devices, -1).mean(axis=1)
                assert np.ptp(own) < 1.1 * devices / len(batch)  # in order: 0.5 or more


def test_places_are_uniform_over_steps():
    many = jax.vmap(places)(jnp.arange(500))
    assert abs(float(many[:, 0].mean()) - 0.5 / N) < 4 / N / 12**0.5 / 500**0.5
    assert np.unique(many[:, 0]).size > 490


def test_a_row_has_its_place_by_number_whatever_the_microbatch():
    rows = jnp.array([9, 2, 5])
    part = stratified(jax.random.key(1), rows, N)
    np.testing.assert_array_equal(part, places(1)[rows])


def test_no_row_shares_its_key_with_the_batch():
    key = jax.random.key(1)
    u = stratified(key, jnp.arange(1), 1)[0]
    draws = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i)))(jnp.arange(64))
    assert not (draws == u).any() and u != jax.random.uniform(key)


@pytest.mark.parametrize("place, time", [(0.0, 0.001), (0.5, 0.5005), (0.75, 0.75025)])
def test_mdlms_noise_by_hand(place, time):
    """t = 0.999 u + 0.001; masked with 0.999 t, and weighed by 1/t all the same."""
    noise = stratified_noise(jnp.array([place]), 1e-3)
    np.testing.assert_allclose(noise.time, [time], rtol=1e-5)
    np.testing.assert_allclose(noise.ratio, [0.999 * time], rtol=1e-5)
    np.testing.assert_allclose(noise.weight, [1 / time], rtol=1e-5)


# ----------------------------------------------------------------------------------- corruption

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
