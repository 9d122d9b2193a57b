"""Reading a search by hand-made tables, and searches that know where to look."""

from itertools import combinations, islice

import numpy as np
import pytest

from dials_jax.statistics import rank_correlation
from dials_jax.studies import placements as module
from dials_jax.studies.placements import Placements
from dials_jax.studies.search import (
    best_schedule,
    fit_additive,
    measure_regret,
    propose_at_random,
    propose_by_additive_model,
    propose_by_importance,
    segment_counts,
    segment_harm,
    segment_influence,
    time_weights,
    try_schedules,
)

HARM = np.array([0.1, 0.4, 1.0, 1.6, 2.0, 2.1, 1.5, 0.9, 0.3, 0.2])


@pytest.fixture(scope="module")
def table():
    """A search of 210 schedules whose segments add up, with samples of common difficulty."""
    rng = np.random.default_rng(0)
    light = Placements(10, 4).table
    means = 40 + light @ HARM
    values = means[:, None] + rng.normal(0, 5, 160) + rng.normal(0, 2, (len(light), 160))
    return light, means, values


def test_every_placement_comes_once():
    light = Placements(6, 2).table
    assert [tuple(np.flatnonzero(row)) for row in light] == list(combinations(range(6), 2))
    assert Placements(10, 4).table.shape == (210, 10)


@pytest.mark.parametrize("size", [(6, 2), (7, 4), (5, 5), (9, 1)])
def test_a_placement_is_known_by_its_number(size):
    light = Placements(*size)
    chosen = [light.chosen(number) for number in range(light.total)]
    assert chosen == [list(one) for one in combinations(range(size[0]), size[1])]
    assert [light.number_of(one) for one in chosen] == list(range(light.total))
    np.testing.assert_array_equal([light.light(n) for n in range(light.total)], light.table)


@pytest.mark.parametrize("seed", range(4))
def test_many_placements_come_in_the_order_that_a_table_has(seed, monkeypatch):
    costs, light = np.random.default_rng(seed).normal(size=9), Placements(9, 4)
    expected = list(light.sorted_by_cost(costs))
    monkeypatch.setattr(module, "MAX_SORTED", 1)
    assert list(light.sorted_by_cost(costs)) == expected
    alike = list(light.sorted_by_cost(np.round(costs)))  # many equal sums: in order of the sums
    assert sorted(alike) == list(range(light.total))
    assert (np.diff(light.table[alike] @ np.round(costs)) >= 0).all()
    assert list(Placements(6, 1).sorted_by_cost(np.zeros(6))) == list(range(6))


def test_placements_come_once_in_random_order(monkeypatch):
    light = Placements(6, 3)
    shuffled = [list(light.shuffled(seed)) for seed in (0, 0, 1)]
    monkeypatch.setattr(module, "MAX_SHUFFLED", 1)
    drawn = [list(islice(light.shuffled(seed), 20)) for seed in (0, 0, 1)]
    for first, again, other in (shuffled, drawn):
        assert sorted(first) == list(range(20)) and first == again != other


@pytest.mark.parametrize("harm", [None, np.linspace(0, 1, 40) ** 2])
def test_a_search_looks_at_few_of_very_many_placements(harm, monkeypatch):
    """Of 138 thousand million, by steps and not by seconds."""
    compared = []
    whole = module.heapq.heappush
    monkeypatch.setattr(
        module.heapq, "heappush", lambda heap, entry: (compared.append(1), whole(heap, entry))
    )
    light = Placements(40, 20)
    rng = np.random.default_rng(0)
    trials = try_schedules(
        propose_by_additive_model(light, 0, harm), lambda number: rng.normal(), 30, light.total
    )
    assert len(set(trials.tried)) == 30 and max(trials.tried) < light.total
    assert len(compared) <= 30 * 31 * 20


def test_sedykh_8_on_a_table():
    light = Placements(3, 1).table
    values = np.array([[1.0, 3.0], [4.0, 4.0], [9.0, 3.0]])
    found = segment_influence(light, values)
    np.testing.assert_allclose(found.value, [2 - 4, 4 - 4, 6 - 4], atol=1e-12)
    by_sample = values - values.mean(axis=0)  # one schedule a segment
    half = 12.7062 * by_sample.std(axis=1, ddof=1) / np.sqrt(2)
    np.testing.assert_allclose(found.high - found.value, half, rtol=1e-4)
    two = segment_influence(Placements(3, 2).table, values)  # schedules 01, 02, 12
    np.testing.assert_allclose(two.value, [3 - 4, 4 - 4, 5 - 4], atol=1e-12)


def test_what_samples_have_in_common_is_no_uncertainty(table):
    light, _, values = table
    influence = segment_influence(light, values)
    assert (influence.high - influence.low < 0.3).all()
    shifted = segment_influence(light, values + np.random.default_rng(1).normal(0, 99, 160))
    np.testing.assert_allclose(shifted.low, influence.low, atol=1e-9)


def test_segments_of_the_best_and_the_worst():
    light, perplexity = Placements(4, 2).table, np.array([5.0, 1.0, 4.0, 2.0, 6.0, 3.0])
    best, worst = segment_counts(light, perplexity, 2)  # (0, 2), (1, 2); (0, 1), (1, 3)
    assert best.tolist() == [1, 1, 2, 0] and worst.tolist() == [1, 2, 0, 1]


def test_harm_is_the_integral_over_a_segments_times():
    times = np.array([0.05, 0.95, 0.5])
    np.testing.assert_allclose(segment_harm(times, np.ones(3), 4), 0.25)
    harm = segment_harm(np.linspace(0, 1, 11), np.linspace(0, 1, 11) ** 1, 2)
    np.testing.assert_allclose(harm, [3 / 8, 1 / 8], rtol=1e-4)  # segment 0 is t in (1/2, 1)


def test_weights_integrate_over_the_chosen_steps_only():
    times = np.array([0.9, 0.1, 0.5])
    chosen = np.array([True, False, False, True, True])  # t in (0.8, 1) and (0, 0.4)
    weights = time_weights(times, chosen)
    # Of t itself, but 0.1 below t = 0.1 and 0.9 above t = 0.9.
    expected = [(0.9**2 - 0.8**2) / 2 + 0.09, 0.01 + (0.4**2 - 0.1**2) / 2]
    np.testing.assert_allclose(weights @ times, sum(expected), rtol=1e-5)
    np.testing.assert_allclose(weights + time_weights(times, ~chosen),
                               time_weights(times, np.ones(5, bool)))  # fmt: skip


def test_an_additive_model_recovers_what_adds_up(table):
    light, means, _ = table
    chosen = np.random.default_rng(0).permutation(210)[:60]
    expected = HARM - HARM.mean()
    effects = fit_additive(light[chosen], means[chosen], ridge=1e-6)
    np.testing.assert_allclose(effects, expected, atol=1e-3)
    # Two trials and the right shape: the scale is found, where shape alone would not do.
    few = np.array([np.argmin(means), np.argmax(means)])
    effects = fit_additive(light[few], means[few], harm=7 * HARM + 3, ridge=1e-6)
    np.testing.assert_allclose(effects, expected, rtol=0.25)


def test_a_search_never_tries_twice_and_knows_no_more_than_it_tried(table):
    means = table[1]
    light, asked = Placements(10, 4), []

    def measure(schedule):
        asked.append(schedule)
        return float(means[schedule])

    trials = try_schedules(
        propose_by_additive_model(light, seed=0), measure, budget=30, num_schedules=210
    )
    assert asked == trials.tried and len(set(asked)) == 30
    assert means[best_schedule(trials)] == min(trials.perplexity)
    assert len(try_schedules(propose_at_random(light, 0), measure, 999, 210).tried) == 210
    assert try_schedules(propose_by_importance(light, HARM), measure, 1, 210).tried == [
        int(np.argmin(means))
    ]


def test_knowing_more_costs_less(table):
    light, values = Placements(10, 4), table[2]
    methods = {
        "chance": lambda seed: propose_at_random(light, seed),
        "additive": lambda seed: propose_by_additive_model(light, seed),
        "importance": lambda seed: propose_by_importance(light, HARM),
        "both": lambda seed: propose_by_additive_model(light, seed, HARM),
    }
    found = {
        name: measure_regret(make, values, 12, num_repeats=20).mean
        for name, make in methods.items()
    }
    assert found["both"] < 0.3 > found["importance"]
    assert found["additive"] < found["chance"]
    everything = measure_regret(methods["chance"], values, 210, num_repeats=3)
    assert everything == (0, 0, 0)


def test_nothing_is_judged_by_the_samples_that_chose_it():
    values = np.random.default_rng(0).normal(40, 1, (50, 40))  # all schedules are equally good
    found = measure_regret(lambda seed: propose_at_random(Placements(50, 1), seed), values, 1)
    best_of_noise = 40 - np.mean([values[:, i::2].mean(axis=1).min() for i in range(2)])
    assert abs(found.mean) < 0.2 < 0.4 < best_of_noise


def test_a_wrong_importance_is_corrected_by_trials(table):
    light, values = Placements(10, 4), table[2]
    wrong = HARM[::-1] + np.where(np.arange(10) < 4, 3, 0)
    with_it = measure_regret(
        lambda s: propose_by_importance(light, wrong), values, 40, num_repeats=10
    ).mean
    corrected = measure_regret(
        lambda s: propose_by_additive_model(light, s, wrong), values, 40, num_repeats=10
    )
    assert corrected.mean < with_it - 0.3


def test_the_rank_correlation_and_its_noise(table):
    light, means, values = table
    exact = rank_correlation((light @ HARM)[None], means[None], num_resamples=20)
    assert min(exact[:3]) > 0.999  # some schedules tie
    noisy = rank_correlation((light @ HARM)[None], values.T, num_resamples=100)
    assert noisy.low <= noisy.value < 1 and noisy.low > 0.9


def test_the_interval_of_the_rank_correlation_holds_the_one_without_noise(table):
    light, means, _ = table
    rng = np.random.default_rng(1)
    held = 0
    for draw in range(20):
        guess = light @ (HARM + rng.normal(0, 0.2, 10))
        exact = rank_correlation(guess[None], means[None], num_resamples=1).value
        noisy = means[:, None] + rng.normal(0, 3, (len(means), 50))
        found = rank_correlation(guess[None], noisy.T, draw, num_resamples=100)
        assert found.low <= found.value <= found.high
        held += found.low <= exact <= found.high
    assert held >= 12  # a plain percentile interval is lower than the value, and holds none


def test_the_interval_of_the_rank_correlation_holds_it_when_many_schedules_err_together(table):
    light, means, _ = table
    guess = light @ (HARM + 2 * np.eye(10)[0])
    exact = rank_correlation(guess[None], means[None], num_resamples=1).value
    rng = np.random.default_rng(1)
    held = 0
    for draw in range(20):
        noisy = means[:, None] + light[:, :1] * rng.normal(0, 40, 50)
        found = rank_correlation(guess[None], noisy.T, draw, num_resamples=100)
        held += found.low <= exact <= found.high
    assert held >= 17  # quantiles reflected at the value, alone, hold one in ten
