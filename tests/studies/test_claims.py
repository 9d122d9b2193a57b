"""The claims on profiles that are made so that the answer is known."""

import dataclasses

import numpy as np
import pytest

from dials_jax.errors import InputError
from dials_jax.studies import claims
from dials_jax.studies.claims import check_claims
from tests.studies.profiles import random_profile

N, L = 12, 8
FALLING, RISING = np.linspace(0.99, 0.6, L), np.linspace(0.6, 0.99, L)


def made(label, layer, token, family="diffusion", noise=0.004, seed=0):
    """A profile whose sequences differ from given means by noise."""
    random = np.random.default_rng(seed)

    def by_sequence(mean):
        return np.asarray(mean) + noise * random.standard_normal((N, len(mean)))

    tokens = by_sequence(token)
    return dataclasses.replace(
        random_profile(label, sequences=N, layers=len(layer), family=family),
        sequence_layer=by_sequence(layer),
        sequence_token=tokens,
        end_token=tokens,
    )


def smooth(values, end=0.9):
    """Of hidden states: one more than layers."""
    return np.append(values, end)


LLADA = made("LLaDA", FALLING, smooth(FALLING, 0.5))
QWEN = made("Qwen", RISING, np.full(L + 1, 0.3) + 0.1 * np.sin(np.arange(L + 1)), "causal", seed=1)
DREAM = made("Dream", RISING - 0.02, QWEN.sequence_token.mean(0) + 0.01, seed=2)
PAPER = {"LLaDA": LLADA, "Dream": DREAM, "Qwen": QWEN}


def verdicts(profiles, adapted=()):
    return [claim.verdict for claim in check_claims(profiles, adapted)]


def test_models_like_those_of_the_paper_support_its_claims():
    found = check_claims(PAPER, ["Dream"])
    assert [claim.verdict for claim in found] == ["supported"] * 3
    assert [len(claim.evidence) for claim in found] == [2, 4, 6]
    excess, _ = found[0].evidence
    assert excess.value == pytest.approx(FALLING[1:4].mean() - FALLING[4:].mean(), abs=0.01)
    assert excess.low < excess.value < excess.high
    bias, growth, *end = found[1].evidence
    expected = LLADA.sequence_token[:, 1:].mean() - QWEN.sequence_token[:, 1:].mean()
    assert bias.value == pytest.approx(expected) and bias.low < bias.value < bias.high
    assert [e.value for e in end] == [bias.value, growth.value]  # the same tokens here
    assert growth.value == pytest.approx(
        LLADA.sequence_token[:, 1:5].mean() - LLADA.sequence_token[:, 5:].mean()
    )


def test_models_that_do_the_opposite_do_not():
    profiles = {
        "native": made("native", RISING, smooth(RISING[::-1] - 0.5)[::-1]),
        "causal": made("causal", FALLING, smooth(FALLING), "causal"),
        "adapted": made("adapted", RISING, smooth(RISING[::-1] - 0.5)[::-1], seed=3),
    }
    assert verdicts(profiles, ["adapted"]) == ["not supported"] * 3


def test_masks_that_are_alike_support_no_recency_bias():
    """Neighbouring masks are alike in any model; what counts is the end, where they are gone."""
    masks = dataclasses.replace(LLADA, end_token=LLADA.end_token - 0.6)
    (claim,) = check_claims({"LLaDA": masks, "Qwen": QWEN})[1:2]
    assert [number.sign for number in claim.evidence] == [1, 1, -1, 1]
    assert claim.verdict == "not supported"


def test_sequences_without_a_number_at_the_end_are_left_out():
    """Where one call reveals a whole answer, all that it sees is masks."""
    some, none = LLADA.end_token.copy(), np.full_like(LLADA.end_token, np.nan)
    some[0] = np.nan
    for end, left in ((some, slice(1, None)), (none, slice(0, 0))):
        native = dataclasses.replace(LLADA, end_token=end)
        found = check_claims(PAPER | {"LLaDA": native}, ["Dream"])
        *_, bias, growth = found[1].evidence
        expected = claims.recency(QWEN.end_token[left]) - claims.recency(LLADA.end_token[left])
        assert bias.sign == growth.sign == len(expected[:1])
        np.testing.assert_allclose(bias.value, expected.mean() if len(expected) else np.nan)
        assert [number.sign for number in found[2].evidence[4:]] == [bias.sign] * 2


def test_noise_decides_nothing():
    profiles = {
        label: made(label, np.full(L, 0.8), np.full(L + 1, 0.8), family, noise=0.1, seed=seed)
        for seed, (label, family) in enumerate({"n": "diffusion", "c": "causal"}.items())
    }
    assert verdicts(profiles) == ["undecided", "undecided", "not tested"]


def test_claims_about_models_that_are_not_there_are_not_tested():
    assert verdicts({"Qwen": QWEN}) == ["not tested"] * 3
    assert verdicts({"LLaDA": LLADA}) == ["supported", "not tested", "not tested"]
    (redundancy, *_), (alone, *_) = check_claims(PAPER), check_claims({"LLaDA": LLADA})
    assert not redundancy.untested and alone.untested == "the comparison with a causal model"
    shallow = made("shallow", FALLING[:2], FALLING[:3])
    assert verdicts({"shallow": shallow}) == ["not tested"] * 3


def test_sequences_are_paired():
    """Differences of two models hold where each alone varies far more than they differ."""
    common = np.random.default_rng(0).normal(0, 1, (N, 1))
    native = dataclasses.replace(LLADA, sequence_layer=LLADA.sequence_layer + common * FALLING)
    causal = dataclasses.replace(
        QWEN, sequence_layer=native.sequence_layer - 0.1 * (np.arange(L) < 4)
    )
    alone, against = check_claims({"LLaDA": native, "Qwen": causal})[0].evidence
    assert against.value == pytest.approx(0.1)
    assert against.high - against.low < 1e-9 < alone.high - alone.low


@pytest.mark.parametrize("count", [5, 8, 13])
def test_models_of_other_depths_are_compared_at_equal_depths(count):
    """A straight profile is the same line at any number of layers."""
    line = np.linspace(0.9, 0.1, count)[None]
    np.testing.assert_allclose(claims.resample_depth(line, 8), np.linspace(0.9, 0.1, 8)[None])
    deep = np.linspace(0.6, 0.99, count)
    profiles = PAPER | {"Dream": made("Dream", deep, np.full(count + 1, 0.3))}
    layers = check_claims(profiles, ["Dream"])[2].evidence[:2]
    assert all(number.low > 0 for number in layers)


def test_correlations_are_numpys():
    one, two = np.random.default_rng(0).normal(0, 1, (2, 9))
    expected = np.corrcoef(one, two)[0, 1]
    assert claims.profile_correlation(one, two) == pytest.approx(expected)
    assert np.isnan(claims.profile_correlation(one, np.ones(9)))


def test_the_interval_of_a_correlation_is_that_of_its_draws():
    """Equal sequences leave nothing to resample; more noise widens the interval."""
    quiet, loud = (
        claims.nearer_by_correlation(
            "", *(made("", mean, smooth(mean), noise=noise).sequence_layer
                  for mean in (RISING, RISING, FALLING))
        )
        for noise in (0, 0.3)
    )  # fmt: skip
    assert quiet.low == pytest.approx(2) and quiet.high == pytest.approx(2)
    assert loud.low < loud.value < 2 and loud.high - loud.low > 0.01


@pytest.mark.parametrize(
    "adapted, told", [("Drem", "did you mean 'Dream'"), ("Qwen", "is a causal model")]
)
def test_adapted_models_are_diffusion_models_of_the_study(adapted, told):
    with pytest.raises(InputError, match=told):
        check_claims(PAPER, [adapted])


def test_models_measured_on_other_prompts_do_not_compare():
    fewer = random_profile("Qwen", sequences=3, family="causal")
    with pytest.raises(InputError, match="3, 12 sequences do not compare"):
        check_claims({"LLaDA": LLADA, "Qwen": fewer})
    with pytest.raises(InputError, match="2 layers"):
        claims.early_excess(LLADA.sequence_layer[:, :2])
