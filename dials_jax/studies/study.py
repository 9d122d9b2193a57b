"""The studies of model schedules, from a configuration to tables and figures."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dials_jax.config import (
    ImportanceStudy,
    ProposeStudy,
    ScheduleStudy,
    SearchStudy,
    StudyConfig,
    to_dict,
)
from dials_jax.errors import InputError, require, require_packages
from dials_jax.evaluation.results import IDENTITY, RECORDS, Outcome
from dials_jax.files import read_json
from dials_jax.reporting.publish import Shown, as_dicts, publish
from dials_jax.sampling.model_schedule import Schedule
from dials_jax.sharding import on_first_process
from dials_jax.studies import search as search
from dials_jax.studies import tables as report
from dials_jax.studies.from_studies import (
    coarse_schedule,
    coarse_schedules,
    placements_of,
    read_harms,
)
from dials_jax.studies.importance import run_importance
from dials_jax.studies.perplexity_run import Measured, PerplexityRun
from dials_jax.studies.placements import Placements
from dials_jax.studies.proposals import run_proposals
from dials_jax.workdir import exclusive, require_unclaimed

FILES = (RECORDS, "results.csv", "report.html", "plots", "samples", "sweep.json")


def run_study(cfg: StudyConfig, workdir: str | Path) -> dict[str, Any]:
    """Runs what the workdir does not hold yet, then writes its results, plots and report.html.

    Raises: InputError for settings, models or data that would stop the study half-way.
    """
    runners = {
        ScheduleStudy: run_schedules,
        SearchStudy: run_search,
        ImportanceStudy: run_importance,
        ProposeStudy: run_proposals,
    }
    require_packages("eval", "matplotlib", "scipy")
    with exclusive(workdir) as workdir:
        _require_own(workdir, type(cfg).__name__)
        on_first_process(lambda: print(f"results: {workdir}", flush=True))
        results, show = runners[type(cfg)](cfg, workdir)
        on_first_process(show)
        on_first_process(lambda: print(f"report: {workdir / 'report.html'}", flush=True))
    return results


def _require_own(workdir: Path, kind: str) -> None:
    """Raises: InputError for files that this study did not write and would write over."""
    path, known = workdir / "results.json", (workdir / IDENTITY).exists()
    try:
        found = read_json(path).get("kind") if path.exists() else None
    except InputError as error:
        require(known, f"{error}; move it away, or choose another --workdir")
        return  # it is written again from the records
    if found is None and not path.exists():
        require_unclaimed(workdir, IDENTITY, FILES)
    else:
        require(found == kind, f"{path} is not of a {kind}; choose another --workdir")


# ---------------------------------------------------------------------------- given schedules


def run_schedules(cfg: ScheduleStudy, workdir: Path) -> Outcome:
    """Figures 1 and 8 to 11, tables 1 and 2."""
    schedules = [Schedule.parse(text) for text in cfg.schedules]
    bench = PerplexityRun(cfg, schedules, workdir)
    with _progress(bench, len(schedules)) as bar:
        found = {}
        for schedule in schedules:
            found[schedule] = bench.measure(schedule, bar.update)
            _tell(bar, f"{schedule}: {found[schedule].values(cfg.aggregate).mean():.3f}")
    results = _facts(bench)
    rows = report.schedule_rows(found, bench.depths, cfg.aggregate)
    results["schedules"] = as_dicts(rows)
    results["examples"] = report.examples(bench.records.all)

    def draw(folder):
        return report.plot_schedules(rows, cfg, bench.depths, folder)

    return results, _showing("Model schedules", results, rows, draw, workdir)


def _showing(
    title: str,
    results: dict[str, Any],
    rows: Sequence[report.ScheduleRow],
    draw: Callable[[Path], Mapping[Path, str]],
    workdir: Path,
    ends: int | None = None,
) -> Callable[[], None]:
    """Writes and prints; of a long table only so many rows of either end."""
    table = report.schedule_table(rows)
    shown = Shown(title=title, tables={"Schedules": table}, reading=report.READING, draw=draw)

    def show():
        publish(results, as_dicts(rows), shown, workdir)
        print(table.text(ends))

    return show


def _progress(bench: PerplexityRun, num_schedules: int) -> Any:
    """A bar over samples, with the time left, that counts what is there already."""
    from tqdm import tqdm

    done = sum(len(record["nll"]) for record in bench.records.all)
    total = max(num_schedules * bench.cfg.num_samples, done)
    return tqdm(total=total, initial=done, unit="sample", disable=not sys.stderr.isatty())


def _tell(bar: Any, line: str) -> None:
    if jax.process_index() == 0:
        bar.write(line)


def _facts(bench: PerplexityRun) -> dict[str, Any]:
    cfg = bench.cfg
    return {"kind": type(cfg).__name__, "config": to_dict(cfg), **bench.describe()}


# -------------------------------------------------------------------------------------- search


def run_search(cfg: SearchStudy, workdir: Path) -> Outcome:
    """Tries all schedules, or as many as the budget allows; figures 2 to 4 and 7."""
    placements = placements_of(cfg)
    budget = cfg.budget or placements.number
    # All have the same steps and models, so where a budget leaves most out, one is checked for all.
    checked = [coarse_schedule(cfg, 0)] if cfg.budget else coarse_schedules(cfg)
    propose = _proposals(cfg, placements)
    bench = PerplexityRun(cfg, checked, workdir)
    found: dict[int, tuple[Schedule, Measured]] = {}
    with _progress(bench, budget) as bar:

        def measure(number: int) -> float:
            schedule = coarse_schedule(cfg, number)
            measured = bench.measure(schedule, bar.update)
            found[number] = schedule, measured
            value = float(measured.values(cfg.aggregate).mean())
            _tell(bar, f"{len(found)}/{budget} {schedule}: {value:.3f}")
            return value

        trials = search.seek(propose, measure, budget, placements.number)
    results = _facts(bench)
    best_first = [trials.tried[i] for i in np.argsort(trials.perplexity, kind="stable")]
    ranked = dict(found[number] for number in best_first)
    rows = report.schedule_rows(ranked, bench.depths, cfg.aggregate)
    results["schedules"] = as_dicts(rows)
    results["examples"] = report.examples(bench.records.all)
    draw = _nothing
    if cfg.budget is None:
        light = placements.table
        values = np.stack([found[n][1].values(cfg.aggregate) for n in range(len(light))])
        results["segments"] = report.segment_results(light, values, cfg.top)
        draw = partial(report.plot_search, light, values, cfg.top)
    title = "Schedules tried" if cfg.budget else "All schedules of coarse segments"
    return results, _showing(title, results, rows, draw, workdir, ends=5)


def _nothing(folder: Path) -> dict[Path, str]:
    """Figures of a search are of all schedules."""
    return {}


def _proposals(cfg: SearchStudy, placements: Placements) -> search.Propose:
    """In order without a budget; with one, by the additive model and the importance if given."""
    if cfg.budget is None:
        return search.in_order(range(placements.number))
    harms = read_harms(cfg.importance, cfg.light, cfg.num_segments) if cfg.importance else {}
    harm = harms.get("relative_kl", harms.get("kl"))
    return search.by_additive_model(placements, cfg.seed, harm)
