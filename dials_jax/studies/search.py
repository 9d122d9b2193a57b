"""Finds which segments of a trajectory may be light, by an exhaustive search or by few trials.

A trajectory has `n` equal segments, counted from 0 at the fully masked end, and runs the light
model in `k` of them. `light` is [S, n], True where schedule s is light. `values` is [S, N], one
number per schedule and sample, whose mean over samples is the schedule's perplexity. Sample i has
the same key under every schedule, so a mean over schedules has one value per sample, and its
interval is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from dials_jax.errors import require
from dials_jax.studies.placements import Placements

GRID = 2000  # points of an integral over time
RIDGE = 0.3  # squared noise / squared effect of a segment, as the additive model assumes


# ---------------------------------------------------------------------------- evaluating a search


class Influence(NamedTuple):
    """A segment's score by Sedykh (8) and its 95 % interval; positive is harmful."""

    value: Float[np.ndarray, "n"]
    low: Float[np.ndarray, "n"]
    high: Float[np.ndarray, "n"]


def segment_influence(
    light: Bool[np.ndarray, "S n"], values: Float[np.ndarray, "S N"]
) -> Influence:
    """Mean over the schedules that are light in a segment, minus the mean over all: Sedykh (8)."""
    import scipy.stats

    weights = light / light.sum(axis=0) - 1 / len(light)
    by_sample = weights.T @ values
    mean = by_sample.mean(axis=1)
    half = scipy.stats.t.ppf(0.975, values.shape[1] - 1) * scipy.stats.sem(by_sample, axis=1)
    return Influence(mean, mean - half, mean + half)


def segment_counts(
    light: Bool[np.ndarray, "S n"], perplexity: Float[np.ndarray, "S"], num_extremes: int
) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"]]:
    """Counts how often each segment is light among the `num_extremes` best and worst schedules."""
    order = np.argsort(perplexity, kind="stable")
    return light[order[:num_extremes]].sum(axis=0), light[order[-num_extremes:]].sum(axis=0)


def segment_harm(
    times: Float[np.ndarray, "G"], importance: Float[np.ndarray, "G"], num_segments: int
) -> Float[np.ndarray, "n"]:
    """Integrates an importance over the times of each segment; segment 0 ends at t = 1."""
    alone = np.eye(num_segments, dtype=bool)
    return np.stack([time_weights(times, segment) for segment in alone]) @ np.asarray(importance)


def time_weights(
    times: Float[np.ndarray, "G"], chosen: Bool[np.ndarray, "S"]
) -> Float[np.ndarray, "G"]:
    """The weights of the measured times in an integral over chosen steps.

    The integrand is linear between the measured times and constant beyond them.

    Args:
      chosen: which of S equal steps to integrate over; step 0 ends at t = 1.
    """
    order = np.argsort(times)
    points = -(-GRID // len(chosen))  # per step
    grid = (np.arange(len(chosen) * points) + 0.5) / (len(chosen) * points)
    inside = grid[np.repeat(chosen[::-1], points)]
    weights = np.empty(len(times))
    for number, values in zip(order, np.eye(len(times)), strict=True):
        weights[number] = np.interp(inside, np.asarray(times)[order], values).sum() / len(grid)
    return weights


# ------------------------------------------------------------------- searching with fewer trials


class Trials(NamedTuple):
    """The trials of a search so far."""

    tried: list[int]  # numbers of the schedules, in order
    perplexity: list[float]  # one per trial


Propose = Callable[[Trials], int]  # returns the schedule to try next; serves one search only


def try_schedules(
    propose: Propose, measure: Callable[[int], float], budget: int, num_schedules: int
) -> Trials:
    """Proposes and measures schedules in turn: `budget` of them, or all if there are fewer."""
    trials = Trials([], [])
    for _ in range(min(budget, num_schedules)):
        schedule = propose(trials)
        trials.perplexity.append(measure(schedule))
        trials.tried.append(schedule)
    return trials


def best_schedule(trials: Trials) -> int:
    """The number of the schedule with the lowest perplexity."""
    return trials.tried[int(np.argmin(trials.perplexity))]


def propose_in_order(numbers: Iterable[int]) -> Propose:
    """Proposes schedules in the given order, without looking at the trials."""
    order = iter(numbers)
    return lambda trials: next(order)


def propose_at_random(placements: Placements, seed: int) -> Propose:
    """Proposes schedules in random order: the baseline of all methods."""
    return propose_in_order(placements.shuffled(seed))


def propose_by_importance(placements: Placements, harm: Float[np.ndarray, "n"]) -> Propose:
    """Proposes schedules by the total harm of their light segments; needs no trial."""
    return propose_in_order(placements.sorted_by_cost(harm))


def propose_by_additive_model(
    placements: Placements, seed: int, harm: Float[np.ndarray, "n"] | None = None
) -> Propose:
    """Proposes the schedule of the lowest perplexity by a model fitted to the trials so far.

    The model predicts perplexity as a sum of effects of the light segments.

    Args:
      harm: the measured importance. The fit is then shrunk to a multiple of it, and the first
        trials are those of least harm. Without it the first trials are random.
    """
    if harm is None:
        propose_first, num_first = propose_at_random(placements, seed), placements.num_segments // 2
    else:
        propose_first, num_first = propose_by_importance(placements, harm), 2
    tried: dict[int, Bool[np.ndarray, "n"]] = {}

    def propose(trials: Trials) -> int:
        if len(trials.tried) < num_first:
            return propose_first(trials)
        tried.update((number, placements.light(number)) for number in trials.tried[len(tried) :])
        effects = fit_additive(np.array([*tried.values()]), np.array(trials.perplexity), harm)
        return next(n for n in placements.sorted_by_cost(effects) if n not in tried)

    return propose


def fit_additive(
    light: Bool[np.ndarray, "m n"],
    perplexity: Float[np.ndarray, "m"],
    harm: Float[np.ndarray, "n"] | None = None,
    ridge: float = RIDGE,
) -> Float[np.ndarray, "n"]:
    """Fits the effects of light segments by ridge regression.

    With `harm` an effect is scale * harm + rest, and mainly the rest is shrunk. Effects sum to
    zero: all schedules have the same number of light segments, so a constant would change nothing.
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
    """The perplexity of a method's choice, minus that of the exhaustive choice.

    Both choose on one half of the samples and are measured on the other half, because the lowest of
    many noisy numbers is lower than its true value. Below 0 the method's choice was the better one.
    """

    mean: float  # over repeats
    low: float  # 2.5 % and 97.5 % of repeats
    high: float


def measure_regret(
    make_method: Callable[[int], Propose],
    values: Float[np.ndarray, "S N"],
    budget: int,
    num_repeats: int = 100,
    seed: int = 0,
) -> Regret:
    """Replays a method on a finished search.

    Args:
      make_method: makes the method from a seed; called for each repeat.
    """
    num_schedules, num_samples = values.shape
    require(num_samples >= 4, f"{num_samples} samples per schedule are too few to split in halves")
    found = []
    for repeat in range(num_repeats):
        order = np.random.default_rng([seed, repeat]).permutation(num_samples)
        choose, judge = np.array_split(order, 2)
        perplexity, held_out = values[:, choose].mean(axis=1), values[:, judge].mean(axis=1)
        trials = try_schedules(
            make_method(repeat), lambda s, p=perplexity: float(p[s]), budget, num_schedules
        )
        found.append(held_out[best_schedule(trials)] - held_out[np.argmin(perplexity)])
    return Regret(float(np.mean(found)), *map(float, np.quantile(found, [0.025, 0.975])))
