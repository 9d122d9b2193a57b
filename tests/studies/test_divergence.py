"""Differences between models by noise level, against the formulas written out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dials_jax import trees
from dials_jax.errors import InputError
from dials_jax.models import families
from dials_jax.models.model import Model
from dials_jax.studies import divergence
from dials_jax.studies.divergence import Divergence, compute_curve, compute_curves, divergences
from tests.conftest import MASK, init_params, small_config

TIME = 0.4


@pytest.fixture(scope="module")
def light():
    cfg = small_config(num_layers=1)
    return Model(cfg, jax.tree.map(lambda x: 4 * x, init_params(cfg, 5)))


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(2, 60, (5, 12))


@pytest.fixture(scope="module")
def found(lively, light, tokens):
    return divergences(lively, {"L": light, "same": lively}, tokens, TIME, seed=3, batch_size=5)


def masks_of(tokens, seed, time):
    key = jax.random.fold_in(jax.random.key(seed), round(time * 1e6))
    keys = [jax.random.fold_in(key, i) for i in range(len(tokens))]
    return np.array([jax.random.uniform(key, tokens.shape[1:]) < time for key in keys])


def test_sedykh_5_to_7(lively, light, tokens, found):
    masked = masks_of(tokens, 3, TIME)
    noisy = np.where(masked, MASK, tokens)
    heavy_log, light_log = (
        np.asarray(jax.nn.log_softmax(m.apply(noisy).logits.at[..., MASK].set(-jnp.inf)))
        for m in (lively, light)
    )
    for row in range(len(tokens)):
        places = np.flatnonzero(masked[row])
        heavy_loss, light_loss = (
            -np.mean([log[row, i, tokens[row, i]] for i in places])
            for log in (heavy_log, light_log)
        )
        kl = [
            sum(
                np.exp(heavy_log[row, i, v]) * (heavy_log[row, i, v] - light_log[row, i, v])
                for v in range(MASK)
            )
            for i in places
        ]
        np.testing.assert_allclose(found["L"].loss_gap[row], light_loss - heavy_loss, atol=2e-5)
        np.testing.assert_allclose(found["L"].kl[row], np.mean(kl), rtol=1e-4)


def test_a_model_does_not_differ_from_itself(found):
    np.testing.assert_allclose(found["same"].loss_gap, 0, atol=1e-6)
    np.testing.assert_allclose(found["same"].kl, 0, atol=1e-6)
    assert np.abs(found["L"].kl).min() > 1e-2


def test_neither_batches_nor_slices_nor_other_models_matter(
    lively, light, tokens, found, monkeypatch
):
    monkeypatch.setattr(divergence, "POSITION_CHUNK", 5)
    again = divergences(lively, {"L": light}, tokens, TIME, seed=3, batch_size=2)
    np.testing.assert_allclose(again["L"], found["L"], rtol=1e-4, atol=1e-5)
    other = divergences(lively, {"L": light}, tokens, TIME, seed=4, batch_size=2)
    assert not np.allclose(other["L"].kl, found["L"].kl)


def test_rows_without_a_mask_are_left_out(lively, light, tokens):
    out = divergences(lively, {"L": light}, tokens, 0.05, batch_size=5)["L"]
    empty = ~masks_of(tokens, 0, 0.05).any(axis=1)
    assert 0 < empty.sum() < len(tokens) - 1
    assert (np.isnan(out.kl) == empty).all() and (np.isnan(out.loss_gap) == empty).all()
    point = compute_curve([0.05], [out.kl])
    assert np.isclose(point.value[0], out.kl[~empty].mean())


def test_a_model_that_says_nan_is_refused(lively, light, tokens):
    broken = Model(light.config, trees.map_named(lambda name, x: x * np.nan, light.params))
    with pytest.raises(InputError, match=r"model 'L' .* outputs NaN or infinity at t=0.5; look"):
        divergences(lively, {"L": broken}, tokens, 0.5, batch_size=5)


def test_the_relative_divergence_is_paired_by_sequence():
    kl, base = np.array([1.0, 2.0, 4.0]), np.array([0.5, 1.5, 3.5])
    gap = np.array([-1.0, 1.0, 3.0])
    measured = {"L": [Divergence(gap, kl)], "H2": [Divergence(gap, base)]}
    found = compute_curves([0.5], measured, second_heavy="H2")
    assert found["loss"]["L"].value == 5 / 3 and found["gap"]["L"].value == 1
    assert set(found["relative_kl"]) == {"L"} and set(found["kl"]) == {"L", "H2"}
    relative = found["relative_kl"]["L"]
    # Both vary from sequence to sequence, but the difference never does.
    assert relative.low == relative.value == relative.high == 0.5
    assert found["kl"]["L"].high > found["kl"]["L"].value + 1


def test_models_of_other_vocabularies_are_refused(lively, tokens):
    cfg = dataclasses.replace(lively.config, mask_id=62)
    with pytest.raises(InputError, match=r"model 'L' has vocab_size and mask_id \(64, 62\)"):
        divergences(lively, {"L": Model(cfg, lively.params)}, tokens, TIME)


@pytest.mark.parametrize("time_conditioning", [True, False])
def test_time_conditioned_models_are_told_the_time(tokens, time_conditioning):
    cfg = families.mdlm_small(
        1, 32, 64, MASK, 1, 0, time_conditioning=time_conditioning, dtype="float32"
    )

    def noisy_model(seed):
        """Modulation starts at zero: noise makes it matter."""

        def noise(name, x):
            key = jax.random.fold_in(jax.random.key(seed), len(name))
            return x + 0.1 * jax.random.normal(key, x.shape)

        return Model(cfg, trees.map_named(noise, init_params(cfg)))

    heavy, light = noisy_model(1), noisy_model(2)
    masked = masks_of(tokens, 0, TIME)
    hidden, told = np.where(masked, MASK, tokens), np.full(len(tokens), TIME, np.float32)

    def log_probs(model, time):
        logits = model.apply(hidden, time=time).logits
        return np.asarray(jax.nn.log_softmax(logits.at[..., MASK].set(-1e6)))

    def kl(time):
        first, other = log_probs(heavy, time), log_probs(light, time)
        return ((np.exp(first) * (first - other)).sum(-1) * masked).sum(1) / masked.sum(1)

    found = divergences(heavy, {"L": light}, tokens, TIME, batch_size=5)["L"].kl
    np.testing.assert_allclose(found, kl(told), rtol=1e-3)
    assert np.allclose(kl(told), kl(None), rtol=1e-2) != time_conditioning
