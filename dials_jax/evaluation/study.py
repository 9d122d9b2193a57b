"""The studies of model schedules, from a configuration to tables and figures."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from dials_jax import sharding
from dials_jax.analysis import schedule_search as search
from dials_jax.analysis.step_importance import Divergence, check_family, curves, divergences
from dials_jax.config import (
    ImportanceStudy,
    ProposeStudy,
    SamplingStudy,
    ScheduleStudy,
    SearchStudy,
    StudyConfig,
    require,
    to_dict,
)
from dials_jax.data.batches import generator
from dials_jax.data.sources import training_data
from dials_jax.evaluation import importance_report, proposal_report
from dials_jax.evaluation import study_report as report
from dials_jax.evaluation.readings import coarse_schedules, read_harms, read_search
from dials_jax.evaluation.results import Records, environment
from dials_jax.evaluation.sampled import Bench, Measured, require_known
from dials_jax.loading import load
from dials_jax.models.model import Model
from dials_jax.sampling.schedule import Schedule

# Settings that choose among what is measured, or how it is shown: a study goes on when they change.
READING = ("schedules", "figure", "aggregate", "top", "budget", "importance")


def run_study(cfg: StudyConfig, workdir: str | Path) -> dict[str, Any]:
    """Runs what the workdir does not hold yet, then writes results.json, results.csv and plots.

    Raises: InputError for settings, models or data that would stop the study half-way.
    """
    runners = {
        ScheduleStudy: run_schedules,
        SearchStudy: run_search,
        ImportanceStudy: run_importance,
        ProposeStudy: run_proposals,
    }
    workdir = Path(workdir).absolute()
    print(f"results: {workdir}", flush=True)
    return runners[type(cfg)](cfg, workdir)


def identity(cfg: StudyConfig, weights: dict[str, Any]) -> dict[str, Any]:
    """What measurements depend on; `weights` are fingerprints."""
    settings = {name: value for name, value in to_dict(cfg).items() if name not in READING}
    return {"kind": type(cfg).__name__, "config": settings, "weights": weights}


# ---------------------------------------------------------------------------- given schedules


def run_schedules(cfg: ScheduleStudy, workdir: Path) -> dict[str, Any]:
    """Figures 1 and 8 to 11, tables 1 and 2."""
    schedules = [Schedule.parse(text) for text in cfg.schedules]
    bench, records = _open(cfg, schedules, workdir)
    with _progress(cfg, len(schedules), records) as bar:
        found = {}
        for schedule in schedules:
            found[schedule] = bench.measure(schedule, records, bar.update)
            bar.write(f"{schedule}: {found[schedule].values(cfg.aggregate).mean():.3f}")
    results = _facts(cfg, bench)
    rows = report.schedule_rows(found, _depths(bench), cfg.aggregate)
    results["schedules"] = report.as_dicts(rows)
    results["examples"] = report.examples(records.all)
    report.write(results, report.as_dicts(rows), workdir)
    report.plot_schedules(rows, cfg, _depths(bench), workdir / "plots")
    print(report.schedule_table(rows))
    return results


def _open(
    cfg: SamplingStudy, schedules: Sequence[Schedule], workdir: Path
) -> tuple[Bench, Records]:
    bench = Bench(cfg, schedules)
    models = {letter: model.fingerprint for letter, model in bench.models.items()}
    weights = {"models": models, "scorer": bench.scorer.fingerprint}
    return bench, Records(workdir, identity(cfg, weights))


def _progress(cfg: SamplingStudy, num_schedules: int, records: Records) -> Any:
    """A bar over samples, with the time left, that counts what is there already."""
    from tqdm import tqdm

    done = sum(len(record["nll"]) for record in records.all)
    total = max(num_schedules * cfg.num_samples, done)
    return tqdm(total=total, initial=done, unit="sample", disable=not sys.stderr.isatty())


def _facts(cfg: StudyConfig, bench: Bench) -> dict[str, Any]:
    model = next(iter(bench.models.values()))
    return {
        "kind": type(cfg).__name__,
        "config": to_dict(cfg),
        **bench.describe(),
        "environment": environment(model, cfg.seed),
    }


def _depths(bench: Bench) -> dict[str, int]:
    """The layers that each model runs."""
    skipped = {letter: len(policy.layers) for letter, policy in bench.policies.items()}
    return {x: model.num_layers - skipped.get(x, 0) for x, model in bench.models.items()}


# -------------------------------------------------------------------------------------- search


def run_search(cfg: SearchStudy, workdir: Path) -> dict[str, Any]:
    """Tries all schedules, or as many as the budget allows; figures 2 to 4 and 7."""
    schedules = coarse_schedules(cfg)
    light = search.placements(cfg.num_segments, cfg.num_light)
    predict = _predictor(cfg, light)
    bench, records = _open(cfg, schedules, workdir)
    budget = cfg.budget or len(schedules)
    found: dict[Schedule, Measured] = {}
    with _progress(cfg, budget, records) as bar:

        def measure(number: int) -> float:
            schedule = schedules[number]
            found[schedule] = bench.measure(schedule, records, bar.update)
            value = float(found[schedule].values(cfg.aggregate).mean())
            bar.write(f"{len(found)}/{budget} {schedule}: {value:.3f}")
            return value

        trials = search.seek(predict, measure, budget, len(schedules))
    results = _facts(cfg, bench)
    best_first = sorted(trials.tried, key=lambda n: trials.perplexity[trials.tried.index(n)])
    ranked = {schedules[n]: found[schedules[n]] for n in best_first}
    rows = report.schedule_rows(ranked, _depths(bench), cfg.aggregate)
    results["schedules"] = report.as_dicts(rows)
    if cfg.budget is None:
        values = np.stack([found[s].values(cfg.aggregate) for s in schedules])
        results["segments"] = report.segment_results(light, values, cfg.top)
        report.plot_search(light, values, cfg.top, workdir / "plots")
    report.write(results, report.as_dicts(rows), workdir)
    print(report.schedule_table(rows[:5] + rows[-5:] if len(rows) > 10 else rows))
    return results


def _predictor(cfg: SearchStudy, light: Bool[np.ndarray, "S n"]) -> search.Predict:
    """In order without a budget; with one, by the additive model and the importance if given."""
    if cfg.budget is None:
        order = np.arange(len(light), dtype=float)
        return lambda trials: order
    harms = read_harms(cfg.importance, cfg.light, cfg.num_segments) if cfg.importance else {}
    harm = harms.get("relative_kl", harms.get("kl"))
    return search.by_additive_model(light, cfg.seed, harm)


# ---------------------------------------------------------------------------------- importance


def run_importance(cfg: ImportanceStudy, workdir: Path) -> dict[str, Any]:
    """Figures 5 and 6, and what schedules would lose by them."""
    from tqdm import tqdm

    schedules = [Schedule.parse(text) for text in cfg.schedules]
    require_known(schedules, [letter for letter, _ in cfg.models])
    mesh = sharding.make_mesh(cfg.mesh)
    models = {letter: load(path, cfg.dtype, mesh, cfg.layout) for letter, path in cfg.models}
    heavy = models.pop(cfg.heavy)
    check_family(heavy.config, {letter: model.config for letter, model in models.items()})
    tokens, data = clean_rows(cfg, heavy)
    weights = {letter: model.fingerprint for letter, model in models.items()}
    weights |= {cfg.heavy: heavy.fingerprint, "data": data}
    records = Records(workdir, identity(cfg, weights))
    done = {record["time"] for record in records.all}
    quiet = not sys.stderr.isatty()
    for time in tqdm([t for t in cfg.times if t not in done], unit="time", disable=quiet):
        found = divergences(heavy, models, tokens, time, seed=cfg.seed, batch_size=cfg.batch_size)
        records.add({"time": time, "models": {k: _plain(v) for k, v in found.items()}})
    measured_at = {record["time"]: record["models"] for record in records.all}
    by_letter = {
        letter: [_divergence(measured_at[t][letter]) for t in cfg.times] for letter in models
    }
    results = {
        "kind": type(cfg).__name__,
        "config": to_dict(cfg),
        "environment": environment(heavy, cfg.seed),
        "num_layers": {cfg.heavy: heavy.num_layers}
        | {letter: model.num_layers for letter, model in models.items()},
        "curves": importance_report.curve_results(curves(cfg.times, by_letter, cfg.heavy2)),
    }
    predicted = importance_report.predictions(schedules, cfg.times, by_letter)
    results["predicted"] = report.as_dicts(predicted)
    report.write(results, importance_report.curve_rows(results["curves"]), workdir)
    importance_report.plot_importance(results, cfg, workdir / "plots")
    print(importance_report.curve_table(results["curves"]))
    if predicted:
        importance_report.plot_predictions(predicted, workdir / "plots")
        print(importance_report.prediction_table(predicted))
    return results


def clean_rows(cfg: ImportanceStudy, heavy: Model) -> tuple[Int[np.ndarray, "N T"], str]:
    """Rows of the data, drawn once by the seed, and the data's fingerprint."""
    data, _ = training_data(cfg.data, heavy.config, heavy.path)
    require(
        data.num_rows >= cfg.num_sequences,
        f"the data has {data.num_rows} rows, fewer than num_sequences={cfg.num_sequences}; "
        "lower it or add text",
    )
    random = generator("step importance", cfg.seed)
    chosen = np.sort(random.choice(data.num_rows, cfg.num_sequences, replace=False))
    tokens, answer, valid = data.rows(chosen)
    require(
        valid is None and bool(answer.all()),
        "the importance study masks whole rows; give text data with prompt_length=0",
    )
    return tokens, data.fingerprint


def _plain(divergence: Divergence) -> dict[str, list[float | None]]:
    """For JSON, which has no NaN."""
    return {
        name: [None if math.isnan(x) else x for x in np.asarray(values, float).tolist()]
        for name, values in divergence._asdict().items()
    }


def _divergence(plain: dict[str, list[float | None]]) -> Divergence:
    return Divergence(**{name: np.array(values, float) for name, values in plain.items()})


# ------------------------------------------------------------------------------------ proposals


def methods_of(
    light: Bool[np.ndarray, "S n"], harms: Mapping[str, Float[np.ndarray, "n"]]
) -> dict[str, Callable[[int], search.Predict]]:
    """Ways to choose what to try next, by name; each is made from a seed."""
    methods = {
        "chance": lambda seed: search.by_chance(len(light), seed),
        "additive model": lambda seed: search.by_additive_model(light, seed),
    }
    for name, harm in harms.items():
        label = proposal_report.HARM_LABELS[name]
        methods[label] = lambda seed, h=harm: search.by_importance(light, h)
        methods[f"{label} + additive"] = lambda seed, h=harm: search.by_additive_model(
            light, seed, h
        )
    return methods


def run_proposals(cfg: ProposeStudy, workdir: Path) -> dict[str, Any]:
    """Replays ways to find a schedule on a finished search, and compares what they find."""
    searched, values = read_search(cfg.search)
    light = search.placements(searched.num_segments, searched.num_light)
    letter, num_segments = searched.light, searched.num_segments
    harms = read_harms(cfg.importance, letter, num_segments) if cfg.importance else {}
    require(
        max(cfg.budgets) <= len(light),
        f"budgets {cfg.budgets} ask for more than the {len(light)} schedules of the search",
    )
    methods = methods_of(light, harms)
    budgets = sorted(cfg.budgets)
    regrets = {
        name: [search.regret(make, values, b, cfg.num_repeats, cfg.seed) for b in budgets]
        for name, make in methods.items()
    }
    choices = proposal_report.choices(
        methods, values, budgets, coarse_schedules(searched), cfg.seed
    )
    correlations = {
        name: search.rank_correlation(light @ harm, values, cfg.seed)
        for name, harm in harms.items()
    }
    results = {
        "kind": type(cfg).__name__,
        "config": to_dict(cfg),
        "segments": {"harm": {name: harm.tolist() for name, harm in harms.items()}},
        "rank_correlation": {name: c._asdict() for name, c in correlations.items()},
        "regret": {name: [r._asdict() for r in found] for name, found in regrets.items()},
        "choices": report.as_dicts(choices),
    }
    workdir.mkdir(parents=True, exist_ok=True)
    report.write(results, report.as_dicts(choices), workdir)
    proposal_report.plot_proposals(
        regrets, budgets, light, values, harms, correlations, workdir / "plots"
    )
    print(proposal_report.regret_table(regrets, budgets, correlations))
    return results
