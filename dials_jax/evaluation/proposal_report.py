"""Tables and figures of ways to find a schedule, replayed on a finished search."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float

from dials_jax.analysis import schedule_search as search
from dials_jax.analysis import study_plots as plots
from dials_jax.analysis.schedule_search import Predict, Regret
from dials_jax.evaluation.statistics import mean_interval
from dials_jax.evaluation.study_report import table
from dials_jax.sampling.schedule import Schedule

HARM_LABELS = {
    "gap": "importance by loss",
    "kl": "importance by KL",
    "relative_kl": "importance by relative KL",
}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a method chose when it saw all samples, against the best of the exhaustive search.

    Both were chosen by the numbers that compare them, which flatters the exhaustive one.
    """

    method: str
    tried: int
    schedule: str
    perplexity: float
    difference: float  # to the exhaustive best, sample by sample
    difference_low: float
    difference_high: float


def choices(
    methods: Mapping[str, Callable[[int], Predict]],
    values: Float[np.ndarray, "S N"],
    budgets: Sequence[int],
    schedules: Sequence[Schedule],
    seed: int,
) -> list[Choice]:
    perplexity = values.mean(axis=1)
    best = int(np.argmin(perplexity))
    rows = []
    for name, make in methods.items():
        for budget in budgets:
            trials = search.seek(make(seed), lambda s: float(perplexity[s]), budget, len(values))
            chosen = search.best_of(trials)
            difference = values[chosen] - values[best]
            low, high = mean_interval(difference)
            rows.append(
                Choice(
                    method=name,
                    tried=budget,
                    schedule=str(schedules[chosen]),
                    perplexity=float(perplexity[chosen]),
                    difference=float(difference.mean()),
                    difference_low=low,
                    difference_high=high,
                )
            )
    return rows


def regret_table(
    regrets: Mapping[str, Sequence[Regret]],
    budgets: Sequence[int],
    correlations: Mapping[str, search.Correlation],
) -> str:
    lines = [(name, *(f"{r.mean:+.3f}" for r in found)) for name, found in regrets.items()]
    head = table(("perplexity above the exhaustive choice, tried", *map(str, budgets)), lines)
    ranks = [f"Spearman, {HARM_LABELS[name]}: {correlation_text(c)}"
             for name, c in correlations.items()]  # fmt: skip
    return "\n".join([head, *ranks])


def correlation_text(c: search.Correlation) -> str:
    return f"{c.value:.2f} ({c.low:.2f} to {c.high:.2f})"


def plot_proposals(
    regrets: Mapping[str, Sequence[Regret]],
    budgets: Sequence[int],
    light: Bool[np.ndarray, "S n"],
    values: Float[np.ndarray, "S N"],
    harms: Mapping[str, Float[np.ndarray, "n"]],
    correlations: Mapping[str, search.Correlation],
    folder: Path,
) -> None:
    plots.regret_curves(budgets, regrets, folder / "regret.png")
    for name, harm in harms.items():
        title = f"{HARM_LABELS[name]}\nSpearman {correlation_text(correlations[name])}"
        path = folder / f"predicted_{name}.png"
        plots.predicted_scatter(light @ harm, values.mean(axis=1), title, path)
