"""Which segments of a trajectory may be light: reading a search, and searching with fewer trials.

A trajectory of `n` equal segments, counted from 0 at the fully masked end, runs the light model in
`k` of them. `light` is [S, n], True where schedule s is light; `values` is [S, N], one number for
each schedule and sample, whose mean over samples is the schedule's perplexity. Sample i has the
same key under every schedule. So a mean over schedules has one value for each sample, and its
interval is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from dials_jax.errors import require
from dials_jax.studies.placements import Placements

GRID = 2000  # points of an integral over the time
RIDGE = 0.3  # squared noise over squared effect that the additive model assumes of a segment


# ------------------------------------------------------------------------------- reading a search


class Influence(NamedTuple):
    """A segment's score by Sedykh (8) and its 95 % interval; positive is harmful."""

    value: Float[np.ndarray, "n"]
    low: Float[np.ndarray, "n"]
    high: Float[np.ndarray, "n"]


def segment_influence(
    light: Bool[np.ndarray, "S n"], values: Float[np.ndarray, "S N"]
) -> Influence:
    """Mean over the schedules that are light in a segment, less the mean over all: Sedykh (8)."""
    import scipy.stats

    weights = light / light.sum(axis=0) - 1 / len(light)
    by_sample = weights.T @ values
    mean = by_sample.mean(axis=1)
    half = scipy.stats.t.ppf(0.975, values.shape[1] - 1) * scipy.stats.sem(by_sample, axis=1)
    return Influence(mean, mean - half, mean + half)


def segment_counts(
    light: Bool[np.ndarray, "S n"], perplexity: Float[np.ndarray, "S"], num_extremes: int
) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"]]:
    """How often each segment is light among the `num_extremes` best and as many worst schedules."""
    order = np.argsort(perplexity, kind="stable")
    return light[order[:num_extremes]].sum(axis=0), light[order[-num_extremes:]].sum(axis=0)


def segment_harm(
    times: Float[np.ndarray, "G"], importance: Float[np.ndarray, "G"], num_segments: int
) -> Float[np.ndarray, "n"]:
    """The integral of an importance over each segment's times; segment 0 ends at t = 1."""
    alone = np.eye(num_segments, dtype=bool)
    return np.stack([time_weights(times, segment) for segment in alone]) @ np.asarray(importance)


def time_weights(
    times: Float[np.ndarray, "G"], chosen: Bool[np.ndarray, "S"]
) -> Float[np.ndarray, "G"]:
    """The weight of each measured time in an integral over some of S equal steps; step 0 ends at 1.

    The integrand is linear between the measured times and constant beyond them.
    """
    order = np.argsort(times)
    points = -(-GRID // len(chosen))  # per step
    grid = (np.arange(len(chosen) * points) + 0.5) / (len(chosen) * points)
    inside = grid[np.repeat(chosen[::-1], points)]
    weights = np.empty(len(times))
    for number, values in zip(order, np.eye(len(times)), strict=True):
        weights[number] = np.interp(inside, np.asarray(times)[order], values).sum() / len(grid)
    return weights


class Correlation(NamedTuple):
    value: float
    low: float  # ends of the 95 % interval
    high: float


def rank_correlation(
    predicted: Float[np.ndarray, "S"],
    values: Float[np.ndarray, "S N"],
    seed: int = 0,
    num_draws: int = 500,
) -> Correlation:
    """Spearman's correlation, with a 95 % bootstrap interval over samples.

    The interval is the union of the percentile and the reflected (basic) bootstrap intervals
    (Davison and Hinkley 1997, sections 5.2 and 5.3), because noise in the perplexities biases
    correlations downwards, and resampling adds as much noise again. On subsets of the two searches
    of docs/results/scheduling.md it held the correlation of all samples in 87 to 100 of 100 draws
    of 256 samples, but in 71 to 95 of 64 samples.
    """
    import scipy.stats

    rng = np.random.default_rng(seed)
    num_samples = values.shape[1]
    draws = []
    for _ in range(num_draws):
        chosen = rng.integers(0, num_samples, num_samples)
        draws.append(scipy.stats.spearmanr(predicted, values[:, chosen].mean(axis=1)).statistic)
    value = scipy.stats.spearmanr(predicted, values.mean(axis=1)).statistic
    low, high = np.quantile(draws, [0.025, 0.975])
    low, high = min(low, 2 * value - high), max(high, 2 * value - low)
    return Correlation(float(value), max(float(low), -1.0), min(float(high), 1.0))


# ------------------------------------------------------------------- searching with fewer trials


class Trials(NamedTuple):
    """What has been measured so far."""

    tried: list[int]  # schedules, in order
    perplexity: list[float]  # theirs


Propose = Callable[[Trials], int]  # gives the schedule to try next; used for one search only


def try_schedules(
    propose: Propose, measure: Callable[[int], float], budget: int, num_schedules: int
) -> Trials:
    """Measures `budget` schedules, or all if there are fewer, as they are proposed."""
    trials = Trials([], [])
    for _ in range(min(budget, num_schedules)):
        schedule = propose(trials)
        trials.perplexity.append(measure(schedule))
        trials.tried.append(schedule)
    return trials


def best_of(trials: Trials) -> int:
    return trials.tried[int(np.argmin(trials.perplexity))]


def in_order(numbers: Iterable[int]) -> Propose:
    """Proposes in a given order, whatever the trials show."""
    left = iter(numbers)
    return lambda trials: next(left)


def by_chance(light: Placements, seed: int) -> Propose:
    """Proposes in random order: what a method that knows something must beat."""
    return in_order(light.in_random_order(seed))


def by_importance(light: Placements, harm: Float[np.ndarray, "n"]) -> Propose:
    """Proposes by the sum of the harm of the light segments: needs no trial."""
    return in_order(light.in_order_of(harm))


def by_additive_model(
    light: Placements, seed: int, harm: Float[np.ndarray, "n"] | None = None
) -> Propose:
    """Fits perplexity as a sum over segments to the trials so far; proposes the lowest prediction.

    Args:
      harm: the measured importance. The fit then shrinks to a multiple of it, and the first
        trials are those of least harm; without it the first trials are random.
    """
    start = by_chance(light, seed) if harm is None else by_importance(light, harm)
    warm_up = light.num_segments // 2 if harm is None else 2
    tried: dict[int, Bool[np.ndarray, "n"]] = {}

    def propose(trials: Trials) -> int:
        if len(trials.tried) < warm_up:
            return start(trials)
        tried.update((number, light.light(number)) for number in trials.tried[len(tried) :])
        effects = fit_additive(np.array([*tried.values()]), np.array(trials.perplexity), harm)
        return next(number for number in light.in_order_of(effects) if number not in tried)

    return propose


def fit_additive(
    light: Bool[np.ndarray, "m n"],
    perplexity: Float[np.ndarray, "m"],
    harm: Float[np.ndarray, "n"] | None = None,
    ridge: float = RIDGE,
) -> Float[np.ndarray, "n"]:
    """Effects of light segments by ridge regression, up to a constant.

    With `harm` they are scale * harm + rest, and mainly the rest is shrunk. Effects sum to zero:
    all schedules are light equally often, so a constant has no effect.
    """
    centred = light - light.shape[1] ** -1.0 * light.sum(axis=1, keepdims=True)
    design, prior = centred, np.eye(light.shape[1])
    if harm is not None:
        shape = (harm - harm.mean()) / max(float(np.std(harm)), 1e-12)
        # The scale is shrunk a tenth as much as a segment's own effect: the prior trusts its shape.
        prior = np.concatenate([prior, np.sqrt(10) * shape[None]])
        design = centred @ prior.T
    offset = design.mean(axis=0)
    x, y = design - offset, perplexity - perplexity.mean()
    solved = x.T @ np.linalg.solve(x @ x.T + ridge * np.eye(len(x)), y)
    effects = prior.T @ solved
    return effects - effects.mean()


# --------------------------------------------------------------------- what fewer trials cost


class Regret(NamedTuple):
    """Perplexity of what a method chose, less that of the exhaustive choice.

    Both choose on one half of the samples and are measured on the other, because the lowest of many
    noisy numbers is lower than the truth. Below 0 the method's choice was the better one.
    """

    mean: float  # over repeats
    low: float  # 2.5 % and 97.5 % of repeats
    high: float


def measure_regret(
    make: Callable[[int], Propose],
    values: Float[np.ndarray, "S N"],
    budget: int,
    num_repeats: int = 100,
    seed: int = 0,
) -> Regret:
    """Replays a method on a finished search.

    Args:
      make: makes the method from a seed, anew for each repeat.
    """
    num_schedules, num_samples = values.shape
    require(num_samples >= 4, f"{num_samples} samples a schedule are too few to split in halves")
    found = []
    for repeat in range(num_repeats):
        order = np.random.default_rng([seed, repeat]).permutation(num_samples)
        choose, judge = np.array_split(order, 2)
        perplexity, held_out = values[:, choose].mean(axis=1), values[:, judge].mean(axis=1)
        trials = try_schedules(
            make(repeat), lambda s, p=perplexity: float(p[s]), budget, num_schedules
        )
        found.append(held_out[best_of(trials)] - held_out[np.argmin(perplexity)])
    return Regret(float(np.mean(found)), *map(float, np.quantile(found, [0.025, 0.975])))
