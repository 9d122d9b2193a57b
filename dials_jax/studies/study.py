"""Runs studies, from the configuration to the report: of model schedules (Sedykh), and of
representations (Goel)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dials_jax.config import (
    ImportanceStudy,
    ProposeStudy,
    ScheduleStudy,
    SearchStudy,
    to_dict,
)
from dials_jax.config_files import open_config
from dials_jax.errors import InputError, require, require_packages
from dials_jax.estimates import device_bytes, print_cost
from dials_jax.evaluation.request_cost import LOWER_BATCH_SIZE
from dials_jax.files import read_json
from dials_jax.progress import Pace, progress_bar
from dials_jax.records import RECORDS
from dials_jax.reporting.publish import Figure, Report, as_dicts, publish
from dials_jax.reporting.results import StudyResults, load_results
from dials_jax.sampling.model_schedule import Schedule
from dials_jax.sharding import on_first_process
from dials_jax.stopping import ending_together
from dials_jax.studies import search, tables
from dials_jax.studies.from_studies import (
    coarse_schedule,
    coarse_schedules,
    placements_of,
    read_harms,
)
from dials_jax.studies.importance import run_importance
from dials_jax.studies.perplexity_run import PerplexityRun, ScoredSamples
from dials_jax.studies.placements import Placements
from dials_jax.studies.profile import PROFILES
from dials_jax.studies.proposals import run_proposals
from dials_jax.studies.report import study_report
from dials_jax.studies.representation import run_representation
from dials_jax.studies.samples import SampledSource
from dials_jax.studies.settings import AnyStudy, RepresentationStudy
from dials_jax.studies.study_records import STUDY
from dials_jax.workdir import exclusive, require_unclaimed

WRITTEN_FILES = (RECORDS, "results.csv", "report.html", "plots", "samples", "sweep.json", PROFILES)


def study(
    config: AnyStudy | str | Path, workdir: str | Path, overrides: Mapping[str, Any] | None = None
) -> StudyResults:
    """Runs a study, except what the workdir holds already, as `dials eval` does.

    Args:
      config: settings, or a file with `get_config()`, or the name of a shipped one, such as
        "mdlm/study_schedules".
      overrides: other values of its fields, as {"num_samples": 64}.

    Returns: what results.json holds, as `load_results` reads it.
    Raises: InputError for settings, models or data that would stop the study half-way.
    """
    run_study(open_config(config, AnyStudy, overrides or {}), workdir)
    return load_results(workdir)


def run_study(cfg: AnyStudy, workdir: str | Path) -> Mapping[str, Any]:
    """Runs a study, except what the workdir holds already; writes results, plots and report.html.

    Raises: InputError for settings, models or data that would stop the study half-way.
    """
    runners = {
        ScheduleStudy: run_schedules,
        SearchStudy: run_search,
        ImportanceStudy: run_importance,
        ProposeStudy: run_proposals,
        RepresentationStudy: run_representation,
    }
    require_packages("eval", "matplotlib", "scipy")
    with exclusive(workdir) as workdir, ending_together():
        _require_own_workdir(workdir, type(cfg).__name__)
        on_first_process(lambda: print(f"results: {workdir}", flush=True))
        report = runners[type(cfg)](cfg, workdir)
        on_first_process(lambda: _publish_and_print(report, workdir))
    return report.results


def _publish_and_print(report: Report, workdir: Path) -> None:
    publish(report, workdir)
    print(report.text)
    print(f"report: {workdir / 'report.html'}", flush=True)


def _require_own_workdir(workdir: Path, kind: str) -> None:
    """Raises: InputError for files of others that this study would overwrite."""
    path, known = workdir / "results.json", (workdir / STUDY).exists()
    try:
        found = read_json(path).get("kind") if path.exists() else None
    except InputError as error:
        require(known, f"{error}; move it away, or choose another --workdir")
        return  # results.json is written anew from the records
    if found is None and not path.exists():
        require_unclaimed(workdir, STUDY, WRITTEN_FILES)
    else:
        require(found == kind, f"{path} is not of a {kind}; choose another --workdir")


# ---------------------------------------------------------------------------- given schedules


def run_schedules(cfg: ScheduleStudy, workdir: Path) -> Report:
    """Measures given schedules, as in Sedykh, Figures 1 and 8 to 11, Tables 1 and 2."""
    schedules = [Schedule.parse(text) for text in cfg.schedules]
    run = PerplexityRun(cfg, schedules, workdir)
    _print_estimate(run, schedules, len(schedules))
    with _progress_bar(run, len(schedules)) as bar:
        found = {}
        for schedule in schedules:
            found[schedule] = run.measure(schedule, bar.update)
            _print_above(bar, f"{schedule}: {found[schedule].values(cfg.aggregate).mean():.3f}")
    rows = tables.schedule_rows(found, run.depths, cfg.aggregate)
    results = _results(run, rows)
    figures = [tables.schedule_figure(rows, cfg, run.depths)]
    return _schedule_report("Model schedules", results, rows, figures)


def _results(run: PerplexityRun, rows: list[tables.ScheduleRow]) -> dict[str, Any]:
    """The contents of results.json."""
    cfg = run.cfg
    return {
        "kind": type(cfg).__name__,
        "config": to_dict(cfg),
        **run.describe(),
        "schedules": as_dicts(rows),
        "examples": tables.first_examples(run.records.all),
    }


def _schedule_report(
    title: str,
    results: dict[str, Any],
    rows: list[tables.ScheduleRow],
    figures: list[Figure],
    ends: int | None = None,
) -> Report:
    """Makes the report.

    Args:
      ends: a terminal shows at most this many lines from the top and the bottom of the table.
    """
    table = tables.schedule_table(rows)
    return study_report(
        title,
        results,
        as_dicts(rows),
        {"Schedules": table},
        tables.STUDY_LEGEND,
        figures,
        table.text(ends),
    )


def _print_estimate(run: PerplexityRun, schedules: Sequence[Schedule], count: int) -> None:
    """Says what drawing the samples that are missing will take.

    Args:
      schedules: some of those that are measured, of the mean cost of all.
      count: of schedules in all.
    """
    left = count * run.cfg.num_samples - run.num_done
    if isinstance(run.samples, SampledSource) and left > 0:
        cost = run.samples.cost(schedules, left)
        weights = cost.memory["weights"] + device_bytes(run.scorer.params)
        cost = cost._replace(memory={**cost.memory, "weights": weights})
        print_cost("samples", cost, LOWER_BATCH_SIZE)
    run.pace = Pace(left, "sampling")


def _progress_bar(run: PerplexityRun, num_schedules: int) -> Any:
    """Makes a progress bar over samples, which starts with those that the records hold."""
    done = run.num_done
    total = max(num_schedules * run.cfg.num_samples, done)
    return progress_bar(total, done, "samples", "sample")


def _print_above(bar: Any, line: str) -> None:
    """Prints a line above a progress bar."""
    if jax.process_index() == 0:
        bar.write(line)


# -------------------------------------------------------------------------------------- search


def run_search(cfg: SearchStudy, workdir: Path) -> Report:
    """Tries all schedules, as in Sedykh, Figures 2 to 4 and 7, or only as many as the budget."""
    placements = placements_of(cfg)
    budget = cfg.budget or placements.total
    # All have the same steps and models, so with a budget it is enough to check one of them.
    checked = [coarse_schedule(cfg, 0)] if cfg.budget else coarse_schedules(cfg)
    propose = _choose_method(cfg, placements)
    run = PerplexityRun(cfg, checked, workdir)
    found: dict[int, tuple[Schedule, ScoredSamples]] = {}
    _print_estimate(run, checked, budget)
    with _progress_bar(run, budget) as bar:

        def measure(number: int) -> float:
            schedule = coarse_schedule(cfg, number)
            samples = run.measure(schedule, bar.update)
            found[number] = schedule, samples
            value = float(samples.values(cfg.aggregate).mean())
            _print_above(bar, f"{len(found)}/{budget} {schedule}: {value:.3f}")
            return value

        trials = search.try_schedules(propose, measure, budget, placements.total)
    best_first = [trials.tried[i] for i in np.argsort(trials.perplexity, kind="stable")]
    ranked = dict(found[number] for number in best_first)
    rows = tables.schedule_rows(ranked, run.depths, cfg.aggregate)
    results, figures = _results(run, rows), []
    if cfg.budget is None:  # influence compares all schedules
        light = placements.table
        values = np.stack([found[n][1].values(cfg.aggregate) for n in range(len(light))])
        results["segments"] = tables.segment_results(light, values, cfg.num_extremes)
        figures = tables.segment_figures(light, values, cfg.num_extremes)
    title = "Schedules tried" if cfg.budget else "All schedules of coarse segments"
    return _schedule_report(title, results, rows, figures, ends=5)


def _choose_method(cfg: SearchStudy, placements: Placements) -> search.Propose:
    """Without a budget, proposes all in order; with one, by the additive model (and importance)."""
    if cfg.budget is None:
        return search.propose_in_order(range(placements.total))
    harms = read_harms(cfg.importance, cfg.light, cfg.num_segments) if cfg.importance else {}
    harm = harms.get("relative_kl", harms.get("kl"))
    return search.propose_by_additive_model(placements, cfg.seed, harm)
