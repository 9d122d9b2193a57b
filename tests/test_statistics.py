import math

import numpy as np
import pytest
import scipy.stats

from dials_jax.errors import InputError
from dials_jax.statistics import (
    Paired,
    adjust_by_holm,
    combined_interval,
    mean_and_stderr,
    mean_at_zero,
    mean_interval,
    paired_ratio,
    paired_test,
    rank_correlation,
    spearman,
    wilson_interval,
)


def keyed(scores):
    return {str(i): score for i, score in enumerate(scores)}


def test_stderr_is_that_of_the_mean():
    scores = np.random.default_rng(0).normal(size=50)
    mean, stderr = mean_and_stderr(scores)
    assert mean == pytest.approx(scores.mean())
    assert stderr == pytest.approx(scipy.stats.sem(scores))


def test_the_error_of_one_score_is_unknown():
    mean, stderr = mean_and_stderr([0.25])
    assert mean == 0.25 and math.isnan(stderr)


def test_a_mean_is_freed_of_what_a_covariate_explains():
    random = np.random.default_rng(0)
    covariate = random.normal(0.5, 1, size=400)
    values = 0.2 + 1.5 * covariate + random.normal(size=400) / 10
    value, low, high = mean_at_zero(values, covariate)
    assert values.mean() > 0.7 and low < 0.2 < high and high - low < 0.05
    fit = scipy.stats.linregress(covariate, values)
    assert value == pytest.approx(fit.intercept)
    half_width = scipy.stats.t.ppf(0.975, 398) * fit.intercept_stderr
    assert (high - low) / 2 == pytest.approx(half_width)


def test_an_interval_at_zero_covers_as_often_as_it_says():
    random = np.random.default_rng(0)

    def covers():
        covariate = random.normal(1, 1, size=12)
        _, low, high = mean_at_zero(2 * covariate + random.normal(size=12), covariate)
        return low < 0 < high

    assert np.mean([covers() for _ in range(400)]) == pytest.approx(0.95, abs=0.03)


@pytest.mark.parametrize("values", [[1.0], [1.0, 3.0], [1.0, 2.0, 6.0]])
def test_a_covariate_that_never_changes_explains_nothing(values):
    value, low, high = mean_at_zero(values, [0.5] * len(values))
    np.testing.assert_array_equal((value, low, high), (np.mean(values), *mean_interval(values)))


def test_two_items_leave_the_interval_unknown():
    value, low, high = mean_at_zero([1.0, 3.0], [1.0, 2.0])
    assert value == pytest.approx(-1) and math.isnan(low) and math.isnan(high)


@pytest.mark.parametrize(
    "successes, n, low, high",  # Newcombe (1998), table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)],
)
def test_wilson_interval_matches_published_values(successes, n, low, high):
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_a_higher_level_widens_the_interval():
    narrow, wide = wilson_interval(7, 10, level=0.8), wilson_interval(7, 10, level=0.99)
    assert wide[0] < narrow[0] < 0.7 < narrow[1] < wide[1]


def test_mcnemar_counts_discordant_pairs_only():
    baseline = [1] * 6 + [0] * 1
    policy = [0] * 6 + [1] * 1
    # Of 7 discordant pairs, at most one goes one way: 2 * (1 + 7) / 2^7.
    few = paired_test(keyed(policy), keyed(baseline))
    many = paired_test(keyed(policy + [1, 0] * 40), keyed(baseline + [1, 0] * 40))
    assert few.p_value == pytest.approx(16 / 128)
    assert many.p_value == pytest.approx(16 / 128)
    assert few.test == many.test == "McNemar"
    assert few.difference == pytest.approx(-5 / 7)
    assert (few.num_items, many.num_items) == (7, 87)


def test_real_scores_take_the_paired_t_test():
    rng = np.random.default_rng(0)
    baseline = rng.normal(3, 1, 30)
    policy = baseline + rng.normal(0.05, 0.1, 30)
    paired = paired_test(keyed(policy), keyed(baseline))
    assert paired.test == "paired t"
    assert paired.p_value == pytest.approx(scipy.stats.ttest_rel(policy, baseline).pvalue)
    assert paired.stderr == pytest.approx(scipy.stats.sem(policy - baseline))


@pytest.mark.parametrize("scores, test", [([0, 1, 1], "McNemar"), ([0.5, 2.0, 3.0], "paired t")])
def test_equal_scores_have_p_one(scores, test):
    assert paired_test(keyed(scores), keyed(scores)) == Paired(0.0, 0.0, 1.0, 3, test)


def test_a_constant_difference_is_certain():
    assert paired_test(keyed([1.5, 2.5, 3.5]), keyed([1.0, 2.0, 3.0])).p_value == 0


def test_items_are_matched_by_key_not_by_order():
    baseline = {"a": 1.0, "b": 2.0, "c": 4.0}
    policy = {"c": 4.5, "a": 1.5, "b": 2.5}
    assert paired_test(policy, baseline) == Paired(0.5, 0.0, 0.0, 3, "paired t")


def test_different_items_are_an_error_that_names_one():
    with pytest.raises(InputError, match=r"2 items .*'b'.*same items"):
        paired_test({"a": 1, "b": 1}, {"a": 1, "c": 0})


def test_holm_corrects_the_smallest_most_and_keeps_the_order():
    assert adjust_by_holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert adjust_by_holm([0.6, 0.9]) == [1.0, 1.0]
    assert adjust_by_holm([]) == []


def test_an_interval_of_one_source_is_students():
    scores = np.random.default_rng(1).normal(size=9)
    mean, stderr = mean_and_stderr(scores)
    assert combined_interval(mean, [(stderr, 8)]) == pytest.approx(mean_interval(scores))
    assert combined_interval(mean, [(stderr, 8), (0.0, 2)]) == pytest.approx(mean_interval(scores))
    assert np.isnan(combined_interval(mean, [(math.nan, 0)])).all()
    assert combined_interval(0.5, [(0.0, 3)]) == (0.5, 0.5)


def test_an_interval_of_two_sources_covers_as_often_as_it_says():
    """Values of few seeds on many items, where both the items and the seeds were drawn."""
    rng, covered = np.random.default_rng(2), 0
    for _ in range(400):
        items, seeds = rng.normal(size=(1, 60)), rng.normal(scale=0.2, size=(4, 1))
        scores = items + seeds + rng.normal(scale=0.3, size=(4, 60))
        of_items = mean_and_stderr(scores.mean(axis=0))[1], 59
        of_seeds = mean_and_stderr(scores.mean(axis=1))[1], 3
        low, high = combined_interval(scores.mean(), [of_items, of_seeds])
        covered += low <= 0 <= high
    assert 0.93 < covered / 400 < 0.985


def ranks_by_counting(values):
    """1 for the smallest; equal values share the mean of their ranks."""
    values = np.asarray(values)
    below = (values[None] < values[:, None]).sum(axis=1)
    equal = (values[None] == values[:, None]).sum(axis=1)
    return below + (equal + 1) / 2


@pytest.mark.parametrize(
    "a, b",
    [
        ([0.1, 0.9, 0.5, 0.7], [3.0, 1.0, 2.5, 0.5]),
        ([1.0, 1.0, 2.0, 5.0, 2.0], [2.0, 7.0, 1.0, 1.0, 3.0]),  # ties
        ([1.0, 2.0, 3.0], [10.0, 20.0, 30.0]),
    ],
)
def test_spearman_is_pearson_of_ranks(a, b):
    expected = np.corrcoef(ranks_by_counting(a), ranks_by_counting(b))[0, 1]
    assert spearman(np.array(a), np.array(b)) == pytest.approx(expected)
    both = spearman(np.array([a, a]), np.array([b, b[::-1]]))
    reversed_ = np.corrcoef(ranks_by_counting(a), ranks_by_counting(b[::-1]))[0, 1]
    np.testing.assert_allclose(both, [expected, reversed_])
    assert math.isnan(spearman(np.ones(4), np.arange(4.0)))


def test_an_interval_of_a_rank_correlation_narrows_with_samples_and_p_does_not():
    random = np.random.default_rng(0)
    order = np.arange(8.0)

    def noisy(number):
        return order + random.normal(0, 6, (number, 8))

    few, many = (rank_correlation(noisy(n), noisy(n)) for n in (20, 2000))
    assert few.low < few.high and many.high - many.low < (few.high - few.low) / 2
    assert many.value > 0.95 and many.p_value == 1 / 501  # none of the orders
    samples = noisy(3), noisy(5)
    assert rank_correlation(*samples, seed=1) == rank_correlation(*samples, seed=1)
    unrelated = rank_correlation(order[None], order[None, [3, 0, 6, 5, 1, 7, 2, 4]])
    assert unrelated.p_value > 0.3 and unrelated.low == unrelated.value  # without noise
    assert all(map(math.isnan, rank_correlation(np.ones((2, 8)), samples[0])))
    with pytest.raises(InputError, match=r"shapes \(4, 2\) and \(5, 2\).* at least 3"):
        rank_correlation(np.ones((4, 2)), np.ones((5, 2)))


def test_a_ratio_of_means_by_hand():
    scores, baseline = {"a": 1, "b": 0, "c": 1, "d": 0}, {"a": 1, "b": 1, "c": 1, "d": 0}
    ratio, low, high = paired_ratio(scores, baseline)
    assert ratio == pytest.approx(2 / 3)
    rest = (np.array([1, 0, 1, 0]) - 2 / 3 * np.array([1, 1, 1, 0])) / 0.75
    half = scipy.stats.t.ppf(0.975, 3) * rest.std(ddof=1) / 2
    assert (low, high) == pytest.approx((2 / 3 - half, 2 / 3 + half))
    assert paired_ratio(baseline, baseline) == (1, 1, 1)
    assert paired_ratio(scores, dict.fromkeys(scores, 0)) is None
    with pytest.raises(InputError, match="1 items are scored on one side only"):
        paired_ratio(scores, {"a": 1, "b": 1, "c": 1})


def test_the_interval_of_a_ratio_covers_it():
    """About 95 % of 300 samples of 80 items, where a policy loses a tenth of what is right."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(300):
        base = (rng.random(80) < 0.7).astype(float)
        own = np.where(rng.random(80) < 0.9, base, 1 - base)
        ratio = paired_ratio(keyed(own.tolist()), keyed(base.tolist()))
        truth = (0.9 * 0.7 + 0.1 * 0.3) / 0.7
        covered += ratio[1] <= truth <= ratio[2]
    assert 0.91 < covered / 300 < 0.98
