"""Makes the tables and figures of measured schedules, and of searches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from dials_jax.config import ScheduleStudy
from dials_jax.evaluation.perplexity import Aggregate, Estimate, estimate_mean
from dials_jax.reporting.publish import Figure, Table
from dials_jax.sampling.model_schedule import Schedule
from dials_jax.statistics import mean_at_zero, mean_interval, paired_test
from dials_jax.studies import plots, search
from dials_jax.studies.perplexity_run import ScoredSamples

SCHEDULES_CAPTION = (
    "Left: generative perplexity with its interval. Right: the same samples against the first "
    "schedule's, one by one, as they are and at equal entropy; only these intervals compare."
)
FRACTIONS_CAPTION = "Perplexity, and what is saved, against the share of light steps."
INFLUENCE_CAPTION = (
    "Perplexity of the schedules that are light in a segment, above the mean schedule: above 0 a "
    "light model does harm."
)
PLACEMENTS_CAPTION = "Which segments the light model takes in the best and the worst schedules."
FREQUENCIES_CAPTION = "How often a segment is light among the best and the worst."
STUDY_LEGEND = (
    ("gen. PPL", "The mean of the samples' perplexities under the scorer, or that of all tokens "
     "together where aggregate is corpus. ± is half the 95 % interval."),
    ("change", "To the first schedule, sample by sample, and its 95 % interval."),
    ("p", "Two-sided paired t-test, not corrected for the number of rows."),
    ("entropy", "Of the tokens within a sample, nats. Repetition lowers it, and perplexity too."),
    ("equal entropy", "What is left of the change in log perplexity between samples of equal "
     "entropy, nats per token: the intercept of a least-squares line through the differences."),
    ("blocks saved", "p (B_H - B_L) / B_H of the paper; FLOPs count everything; time is that of "
     "sampling, without compilation."),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ScheduleRow:
    """One schedule. Intervals are 95 % intervals; the baseline is the first schedule."""

    schedule: str
    perplexity: float  # by the study's aggregate, like the next two and the differences
    low: float
    high: float
    mean_perplexity: float  # mean of the samples' own
    corpus_perplexity: float  # exp of all nats / all tokens
    entropy: float  # of the tokens in a sample, nats
    entropy_low: float
    entropy_high: float
    difference: float  # to the baseline, sample by sample
    difference_low: float
    difference_high: float
    p_value: float
    log_difference: float  # in log perplexity, nats per token, sample by sample
    log_difference_low: float
    log_difference_high: float
    equal_entropy: float  # the same between samples of equal entropy, by least squares
    equal_entropy_low: float
    equal_entropy_high: float
    saved_blocks: float  # p (B_H - B_L) / B_H, Sedykh (3)
    saved_flops: float | None  # of the whole model; None if the baseline is not all heavy
    seconds: float  # of sampling, without compilation
    saved_time: float | None
    num_samples: int


def schedule_rows(
    found: Mapping[Schedule, ScoredSamples], depths: Mapping[str, int], aggregate: Aggregate
) -> list[ScheduleRow]:
    """Computes one row per schedule; the first schedule is the baseline.

    Args:
      depths: the number of layers that each model runs, by letter.
    """
    baseline = next(iter(found))
    base, deepest = found[baseline], max(depths.values())
    all_heavy = mean_depth(baseline, depths) == deepest
    rows = []
    for schedule, samples in found.items():
        values, base_values = samples.values(aggregate), base.values(aggregate)
        own, entropy = estimate_mean(values), estimate_mean(samples.entropy)
        low, high = mean_interval(values - base_values)
        paired = paired_test(_by_number(values), _by_number(base_values))
        logs, at_equal_entropy = _log_differences(samples, base)
        rows.append(
            ScheduleRow(
                schedule=str(schedule),
                perplexity=own.value,
                low=own.low,
                high=own.high,
                mean_perplexity=float(samples.values("mean").mean()),
                corpus_perplexity=float(samples.values("corpus").mean()),
                entropy=entropy.value,
                entropy_low=entropy.low,
                entropy_high=entropy.high,
                difference=paired.difference,
                difference_low=low,
                difference_high=high,
                p_value=paired.p_value,
                log_difference=logs.value,
                log_difference_low=logs.low,
                log_difference_high=logs.high,
                equal_entropy=at_equal_entropy.value,
                equal_entropy_low=at_equal_entropy.low,
                equal_entropy_high=at_equal_entropy.high,
                saved_blocks=1 - mean_depth(schedule, depths) / deepest,
                saved_flops=1 - samples.flops / base.flops if all_heavy else None,
                seconds=samples.seconds,
                saved_time=1 - samples.seconds / base.seconds if all_heavy else None,
                num_samples=len(values),
            )
        )
    return rows


def _log_differences(samples: ScoredSamples, base: ScoredSamples) -> tuple[Estimate, Estimate]:
    """Nats per token above the baseline: as sampled, and at equal entropy.

    A model that repeats itself has lower perplexity, so the second comparison is the fairer one.
    """
    nats = np.log(samples.values("mean")) - np.log(base.values("mean"))
    return estimate_mean(nats), Estimate(*mean_at_zero(nats, samples.entropy - base.entropy))


def mean_depth(schedule: Schedule, depths: Mapping[str, int]) -> float:
    """The number of layers that a step runs on average."""
    return sum(schedule.share(letter) * depths[letter] for letter in schedule.letters)


def _by_number(values: Float[np.ndarray, "N"]) -> dict[str, float]:
    return {str(i): value for i, value in enumerate(values.tolist())}


def first_examples(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The beginning of the first sample of each schedule."""
    return {r["schedule"]: r["example"] for r in records if "example" in r}


# ---------------------------------------------------------------------------------- schedules


def schedule_table(rows: Sequence[ScheduleRow]) -> Table:
    """Makes a table with a line per schedule."""
    header = ("schedule", "gen. PPL", "change", "95 % interval", "p", "entropy",
              "equal entropy", "blocks saved", "FLOPs saved", "time saved", "seconds")  # fmt: skip
    base = rows[0].perplexity
    lines = [
        (
            r.schedule,
            f"{r.perplexity:.2f} ±{(r.high - r.low) / 2:.2f}",
            f"{r.difference / base:+.2%}",
            f"{r.difference_low / base:+.2%} to {r.difference_high / base:+.2%}",
            "<0.001" if r.p_value < 0.001 else f"{r.p_value:.3f}",
            f"{r.entropy:.3f} ±{(r.entropy_high - r.entropy_low) / 2:.3f}",
            f"{r.equal_entropy:+.3f} ±{(r.equal_entropy_high - r.equal_entropy_low) / 2:.3f}",
            _percent(r.saved_blocks),
            _percent(r.saved_flops),
            _percent(r.saved_time),
            f"{r.seconds:.1f}",
        )
        for r in rows
    ]
    return Table(header, lines)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def schedule_figure(
    rows: Sequence[ScheduleRow], cfg: ScheduleStudy, depths: Mapping[str, int]
) -> Figure:
    """Makes the figure that `cfg.figure` names: perplexity per schedule, or by light steps."""
    values = {
        "values": np.array([r.perplexity for r in rows]),
        "intervals": np.array([[r.low for r in rows], [r.high for r in rows]]),
    }
    if cfg.figure == "schedules":
        changes = {
            "as sampled": _series(
                (r.log_difference, r.log_difference_low, r.log_difference_high) for r in rows
            ),
            "at equal entropy": _series(
                (r.equal_entropy, r.equal_entropy_low, r.equal_entropy_high) for r in rows
            ),
        }
        data = values | {
            "labels": [r.schedule for r in rows],
            "title": ", ".join(f"{letter}: {depth} blocks" for letter, depth in depths.items()),
            "changes": changes,
        }
        return Figure("schedules", SCHEDULES_CAPTION, plots.schedule_points, data)
    deepest = max(depths, key=lambda letter: depths[letter])
    savings = {
        "blocks (the paper's formula)": np.array([r.saved_blocks for r in rows]),
        "FLOPs, all counted": np.array([r.saved_flops for r in rows], float),
        "time": np.array([r.saved_time for r in rows], float),
    }
    fractions = np.array([1 - Schedule.parse(r.schedule).share(deepest) for r in rows])
    data = values | {"fractions": fractions, "savings": savings}
    return Figure("fractions", FRACTIONS_CAPTION, plots.fraction_curves, data)


def _series(triples: Iterable[tuple[float, float, float]]) -> plots.Series:
    value, low, high = np.array(list(triples)).T
    return value, np.stack([low, high])


# ------------------------------------------------------------------------------------- search


def segment_results(
    light: Bool[np.ndarray, "S n"], values: Float[np.ndarray, "S N"], num_extremes: int
) -> dict[str, Any]:
    """The influence of each segment, and how often it is light in the best and worst schedules."""
    best, worst = search.segment_counts(light, values.mean(axis=1), num_extremes)
    influence = search.segment_influence(light, values)
    return {
        "influence": {name: x.tolist() for name, x in influence._asdict().items()},
        "light_in_best": best.tolist(),
        "light_in_worst": worst.tolist(),
        "num_extremes": num_extremes,
    }


def segment_figures(
    light: Bool[np.ndarray, "S n"], values: Float[np.ndarray, "S N"], num_extremes: int
) -> list[Figure]:
    """The figures of Sedykh, Figures 2, 3, 4 and 7."""
    perplexity = values.mean(axis=1)
    order = np.argsort(perplexity, kind="stable")
    best, worst = order[:5], order[::-1][:5]
    placements = {
        "best": light[best],
        "worst": light[worst],
        "perplexities": (perplexity[best].tolist(), perplexity[worst].tolist()),
    }
    counts = search.segment_counts(light, perplexity, num_extremes)
    frequencies = {"best": counts[0], "worst": counts[1], "num_extremes": num_extremes}
    influence = {"influence": search.segment_influence(light, values)}
    return [
        Figure("influence", INFLUENCE_CAPTION, plots.influence_bars, influence),
        Figure("best_and_worst", PLACEMENTS_CAPTION, plots.placement_rows, placements),
        Figure("segment_frequencies", FREQUENCIES_CAPTION, plots.segment_frequencies, frequencies),
    ]
