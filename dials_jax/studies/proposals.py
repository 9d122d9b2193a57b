"""Compares methods that find a good schedule with few trials, by replaying them on a search."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float

from dials_jax.config import ProposeStudy, to_dict
from dials_jax.errors import require
from dials_jax.reporting.publish import Figure, Report, Table, as_dicts
from dials_jax.sampling.model_schedule import Schedule
from dials_jax.statistics import RankCorrelation, mean_interval, rank_correlation
from dials_jax.studies import plots, search
from dials_jax.studies.from_studies import coarse_schedules, placements_of, read_harms, read_search
from dials_jax.studies.placements import Placements
from dials_jax.studies.report import study_report
from dials_jax.studies.search import Propose, Regret

HARM_LABELS = {
    "gap": "importance by loss",
    "kl": "importance by KL",
    "relative_kl": "importance by relative KL",
}

REGRET_CAPTION = (
    "Perplexity of a method's choice above that of the exhaustive one: both choose on one half of "
    "the samples and are judged on the other. Below 0 the method chose better."
)
SCATTER_CAPTION = "One point for each schedule: its perplexity against the harm predicted."
PROPOSALS_LEGEND = (
    ("Regret", REGRET_CAPTION),
    ("Spearman", "Of the predicted harm and the perplexity of all schedules."),
    ("Chosen with all samples", "Against the best of the search, on the same samples that chose "
     "both, which favours the exhaustive one."),
)  # fmt: skip


def make_methods(
    placements: Placements, harms: Mapping[str, Float[np.ndarray, "n"]]
) -> dict[str, Callable[[int], Propose]]:
    """The methods by name. Each makes, from a seed, the function that proposes schedules."""
    methods = {
        "chance": lambda seed: search.propose_at_random(placements, seed),
        "additive model": lambda seed: search.propose_by_additive_model(placements, seed),
    }
    for name, harm in harms.items():
        label = HARM_LABELS[name]
        methods[label] = lambda seed, h=harm: search.propose_by_importance(placements, h)
        methods[f"{label} + additive"] = lambda seed, h=harm: search.propose_by_additive_model(
            placements, seed, h
        )
    return methods


def run_proposals(cfg: ProposeStudy, workdir: Path) -> Report:
    """Replays the methods on a finished search, and compares their choices."""
    searched, values = read_search(cfg.search)
    placements = placements_of(searched)
    light = placements.table
    letter, num_segments = searched.light, searched.num_segments
    harms = read_harms(cfg.importance, letter, num_segments) if cfg.importance else {}
    require(
        max(cfg.budgets) <= len(light),
        f"budgets {cfg.budgets} ask for more than the {len(light)} schedules of the search; "
        "lower them",
    )
    methods = make_methods(placements, harms)
    budgets = sorted(cfg.budgets)
    regrets = {
        name: [search.measure_regret(make, values, b, cfg.num_repeats, cfg.seed) for b in budgets]
        for name, make in methods.items()
    }
    chosen = choose_with_all_samples(methods, values, budgets, coarse_schedules(searched), cfg.seed)
    correlations = {
        name: rank_correlation((light @ harm)[None], values.T, cfg.seed)
        for name, harm in harms.items()
    }
    results = {
        "kind": type(cfg).__name__,
        "config": to_dict(cfg),
        "segments": {"harm": {name: harm.tolist() for name, harm in harms.items()}},
        "rank_correlation": {name: c._asdict() for name, c in correlations.items()},
        "regret": {name: [r._asdict() for r in found] for name, found in regrets.items()},
        "choices": as_dicts(chosen),
    }

    tables = {
        "Regret": regret_table(regrets, budgets),
        "Predicted harm and perplexity": correlation_table(correlations),
        "Chosen with all samples": choice_table(chosen),
    }
    return study_report(
        "Good schedules without trying all",
        results,
        as_dicts(chosen),
        {heading: table for heading, table in tables.items() if table.lines},
        PROPOSALS_LEGEND,
        proposal_figures(regrets, budgets, light, values, harms, correlations),
        "\n".join(tables[x].text() for x in ("Regret", "Predicted harm and perplexity")),
    )


# --------------------------------------------------------------------------- tables and figures


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The choice of a method that saw all samples, compared with that of the exhaustive search.

    The samples that compare them also chose both, which favours the exhaustive search.
    """

    method: str
    tried: int
    schedule: str
    perplexity: float
    difference: float  # to the exhaustive choice, sample by sample
    difference_low: float
    difference_high: float


def choose_with_all_samples(
    methods: Mapping[str, Callable[[int], Propose]],
    values: Float[np.ndarray, "S N"],
    budgets: Sequence[int],
    schedules: Sequence[Schedule],
    seed: int,
) -> list[Choice]:
    """Lets every method choose, with every budget."""
    perplexity = values.mean(axis=1)
    best = int(np.argmin(perplexity))
    rows = []
    for name, make in methods.items():
        for budget in budgets:
            trials = search.try_schedules(
                make(seed), lambda s: float(perplexity[s]), budget, len(values)
            )
            chosen = search.best_schedule(trials)
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


def regret_table(regrets: Mapping[str, Sequence[Regret]], budgets: Sequence[int]) -> Table:
    """Makes a table with a line per method and a column per budget."""
    lines = [(name, *(f"{r.mean:+.3f}" for r in found)) for name, found in regrets.items()]
    return Table(("perplexity above the exhaustive choice, tried", *map(str, budgets)), lines)


def correlation_table(correlations: Mapping[str, RankCorrelation]) -> Table:
    lines = [(HARM_LABELS[name], correlation_text(c)) for name, c in correlations.items()]
    return Table(("predicted by", "Spearman, 95 % interval"), lines)


def choice_table(rows: Sequence[Choice]) -> Table:
    header = ("method", "tried", "schedule", "gen. PPL", "above the best", "95 % interval")
    lines = [
        (
            r.method,
            str(r.tried),
            r.schedule,
            f"{r.perplexity:.2f}",
            f"{r.difference:+.2f}",
            f"{r.difference_low:+.2f} to {r.difference_high:+.2f}",
        )
        for r in rows
    ]
    return Table(header, lines)


def correlation_text(c: RankCorrelation) -> str:
    return f"{c.value:.2f} ({c.low:.2f} to {c.high:.2f})"


def proposal_figures(
    regrets: Mapping[str, Sequence[Regret]],
    budgets: Sequence[int],
    light: Bool[np.ndarray, "S n"],
    values: Float[np.ndarray, "S N"],
    harms: Mapping[str, Float[np.ndarray, "n"]],
    correlations: Mapping[str, RankCorrelation],
) -> list[Figure]:
    """A figure of the regret, and one per prediction against the measured perplexity."""
    data = {"budgets": budgets, "regrets": regrets}
    figures = [Figure("regret", REGRET_CAPTION, plots.regret_curves, data)]
    for name, harm in harms.items():
        data = {
            "predicted": light @ harm,
            "measured": values.mean(axis=1),
            "title": f"{HARM_LABELS[name]}\nSpearman {correlation_text(correlations[name])}",
        }
        figures.append(Figure(f"predicted_{name}", SCATTER_CAPTION, plots.predicted_scatter, data))
    return figures
