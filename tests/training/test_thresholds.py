"""Fitted thresholds make a router run the share of layers that was asked for."""

import logging
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dials_jax import sharding, trees
from dials_jax.config import ArithmeticData, ObjectiveConfig, RouterConfig
from dials_jax.data.sources import load_training_data
from dials_jax.errors import InputError
from dials_jax.loading import load
from dials_jax.skipping.routed import Routed, StochasticRouted
from dials_jax.skipping.storage import load_router, router_facts, save_router
from dials_jax.training.thresholds import (
    Calibration,
    calibration_batch,
    fit_thresholds,
    scale_rates,
    threshold_between,
)
from tests.conftest import random_routers

NUM = 64
NONE = np.full(4, np.nan)


@pytest.fixture(scope="module")
def backbone(arithmetic_model):
    return load(arithmetic_model)


@pytest.fixture(scope="module")
def soft(backbone):
    """Routers whose tokens disagree, and whose probabilities of a vote differ."""
    routers = random_routers(backbone.config)
    return Routed({**routers, "vote": routers["vote"] / 5}, 0.1, "soft")


@pytest.fixture(scope="module")
def calibration(backbone):
    rows, _ = load_training_data(ArithmeticData(), backbone.config, held_out=True)
    batch = calibration_batch(rows, NUM, backbone.mesh)
    return Calibration(backbone, ObjectiveConfig(), batch)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3, 0.5, 0.74, 1.0])
def test_a_threshold_lets_as_many_skip_as_it_shall(rate):
    rng = np.random.default_rng(0)
    share, voting = rng.random(50).astype(np.float32), rng.random(50) < 0.8
    share = np.where(voting, share, 0.0)
    tau = threshold_between(jnp.asarray(share), jnp.asarray(voting), jnp.float32(rate))
    assert abs((share > tau).sum() - rate * voting.sum()) <= 0.5


def test_equal_shares_stay_together_and_none_exceeds_nothing():
    share = jnp.array([0.4] * 6 + [0.0] * 4)
    skipped = [
        int((share > threshold_between(share, jnp.ones(10, bool), jnp.float32(rate))).sum())
        for rate in (0.0, 0.2, 0.4, 0.9)
    ]
    assert skipped == [0, 0, 6, 6]


def test_a_layer_that_shall_not_be_skipped_never_is():
    assert threshold_between(jnp.array([0.2, 0.9]), jnp.ones(2, bool), jnp.float32(0.0)) == 1.0


def test_scaled_rates_have_the_mean_and_the_order_of_the_old_ones():
    rates = np.array([0.0, 0.1, 0.5, 0.9])
    for mean in (0.05, 0.3, 0.6, 0.75):
        scaled = scale_rates(rates, mean, NONE)
        assert scaled.mean() == pytest.approx(mean)
        assert (np.diff(scaled) >= 0).all() and scaled[0] == 0 and scaled.max() <= 1
    assert scale_rates(rates, 0.9, NONE).tolist() == [0, 1, 1, 1]  # there is no more
    settled = scale_rates(rates, 0.3, np.array([np.nan, 0.0, np.nan, np.nan]))
    assert settled[1] == 0 and settled.mean() == pytest.approx(0.3)


@pytest.mark.parametrize("ratio", [0.9, 0.6, 0.35])
def test_soft_votes_reach_every_share_within_a_sequence_per_layer(calibration, soft, ratio):
    fitted = calibration.fit(soft, ratio, per_layer=True)
    assert abs(fitted.reached - ratio) <= 1.5 / NUM
    assert len(fitted.thresholds) == 4 and fitted.votes == "soft" and fitted.num_sequences == NUM
    again = calibration.execution(replace(soft, threshold=fitted.threshold))
    assert again == fitted.reached


def test_layers_are_skipped_in_proportion_to_training(calibration, soft):
    """All but the first: there every sequence sees the same embedding, and votes alike."""
    sampled = calibration.layer_skip_rates(StochasticRouted(soft.router, 0.1, 1.0))
    fitted = calibration.fit(soft, 0.8, per_layer=True)
    rates = calibration.layer_skip_rates(replace(soft, threshold=fitted.threshold))
    assert rates[0] in (0, 1)
    np.testing.assert_allclose(rates[1:] / rates[1], sampled[1:] / sampled[1], atol=0.15)


def test_one_threshold_for_all_layers_comes_near(calibration, soft):
    """The first layer runs: there all sequences vote alike, and one step would skip a fourth."""
    bias = soft.router["vote_bias"].at[0].set(jnp.array([0.0, 1e3]))
    soft = replace(soft, router={**soft.router, "vote_bias": bias})
    fitted = calibration.fit(soft, 0.6, per_layer=False)
    assert len(fitted.thresholds) == 1 and isinstance(fitted.threshold, float)
    assert abs(fitted.reached - 0.6) < 0.02


def test_what_fills_the_batch_of_a_mesh_has_no_vote(backbone, soft, monkeypatch):
    """Five texts on eight shards: none is left out, and the thresholds are those of one device."""
    rows, _ = load_training_data(ArithmeticData(), backbone.config, held_out=True)
    rows = replace(rows, pairs=rows.pairs[:5])
    fitted = []
    for shards in (1, 8):
        monkeypatch.setattr(sharding, "num_batch_shards", lambda mesh, n=shards: n)
        batch = calibration_batch(rows, NUM, backbone.mesh)
        monkeypatch.undo()
        assert len(batch.tokens) == (5 if shards == 1 else 8)
        calibration = Calibration(backbone, ObjectiveConfig(kind="mdlm"), batch)
        fitted.append(calibration.fit(soft, 0.6, per_layer=True))
    assert fitted[0].num_sequences == fitted[1].num_sequences == 5
    assert fitted[0].reached == pytest.approx(fitted[1].reached)
    np.testing.assert_allclose(fitted[0].thresholds, fitted[1].thresholds, rtol=1e-5)


def test_what_votes_cannot_reach_is_said(calibration, soft, caplog):
    router = {**soft.router, "vote_bias": jnp.broadcast_to(jnp.array([0.0, 1e3]), (4, 2))}
    with caplog.at_level(logging.WARNING):
        fitted = calibration.fit(Routed(router, 0.1, "hard"), 0.5, per_layer=True)
    assert fitted.reached == 1.0
    assert "out of reach of hard votes: 1.000 was reached; fit soft votes" in caplog.text


def test_unrolled_routers_get_the_thresholds_of_stacked_ones(calibration, soft):
    unrolled = replace(soft, router=trees.unstack(soft.router))
    assert calibration.fit(unrolled, 0.6, True) == calibration.fit(soft, 0.6, True)


def test_fitted_thresholds_are_stored_and_loaded(backbone, soft, tmp_path):
    cfg = RouterConfig(d_hidden=8, votes="soft")
    save_router(tmp_path / "router", soft.router, cfg, backbone, skip_weight=1.0)
    found = [
        fit_thresholds(tmp_path, backbone, ArithmeticData(), ratio, num_sequences=NUM)
        for ratio in (0.5, 0.8, 0.5)
    ]
    assert found[0] == found[2]
    assert router_facts(tmp_path)[1].fitted == (found[1], found[0])
    policy = load_router(tmp_path, backbone, execution_ratio=0.8)
    assert policy.votes == "soft"
    np.testing.assert_array_equal(policy.threshold, np.float32(found[1].thresholds))
    with pytest.raises(InputError, match=r"no thresholds for execution_ratio=0\.7 \(fitted: 0\.8"):
        load_router(tmp_path, backbone, execution_ratio=0.7)
    with pytest.raises(InputError, match="give only one of them"):
        load_router(tmp_path, backbone, 0.1, execution_ratio=0.8)
    with pytest.raises(InputError, match=r"execution_ratio=1\.5 must lie between 0 and 1"):
        fit_thresholds(tmp_path, backbone, ArithmeticData(), 1.5)
    with pytest.raises(InputError, match=r"objective\.kind='causal' does not fit a model"):
        causal = ObjectiveConfig(kind="causal")  # masks nothing, so no router would see a token
        fit_thresholds(tmp_path, backbone, ArithmeticData(), 0.5, objective=causal)


def test_thresholds_per_layer_choose_per_layer(backbone, soft):
    tokens = np.full((3, 8), backbone.config.mask_id)
    gates = backbone.apply(tokens, policy=replace(soft, threshold=[1.0, 0.0, 1.0, 0.0])).gates
    np.testing.assert_array_equal(gates, np.repeat([[True], [False]] * 2, 3, axis=1))
    with pytest.raises(InputError, match=r"shape \(3,\) and the model 4 layers"):
        backbone.apply(tokens, policy=replace(soft, threshold=[0.1, 0.2, 0.3]))


def test_thresholds_share_one_program(backbone, soft):
    traced = []

    @jax.jit
    def gates(policy, tokens):
        from dials_jax.models import transformer

        traced.append(policy)
        return transformer.run_layers(backbone.config, backbone.params, tokens, None, policy).gates

    tokens = jnp.full((2, 8), backbone.config.mask_id)
    for tau in (0.1, 0.5, 0.9):
        gates(replace(soft, threshold=tau), tokens)
    assert len(traced) == 1
