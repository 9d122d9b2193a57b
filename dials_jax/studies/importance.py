"""The study of importance: how far models are from a heavy one at each noise level."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from dials_jax import sharding
from dials_jax.config import ImportanceStudy, to_dict
from dials_jax.data.batches import random_generator
from dials_jax.data.sources import load_training_data
from dials_jax.errors import require
from dials_jax.estimates import (
    RunEstimate,
    activation_bytes,
    device_bytes,
    forward_flops,
    print_cost,
)
from dials_jax.loading import load
from dials_jax.models.model import Model
from dials_jax.progress import progress_bar
from dials_jax.records import require_numbers
from dials_jax.reporting.environment import environment
from dials_jax.reporting.publish import Figure, Report, Table, as_dicts
from dials_jax.sampling.model_schedule import Schedule
from dials_jax.studies import plots
from dials_jax.studies.divergence import (
    Curve,
    Divergence,
    check_family,
    compute_curves,
    divergences,
)
from dials_jax.studies.predictions import predict_losses, prediction_figures, prediction_table
from dials_jax.studies.report import study_report
from dials_jax.studies.samples import require_known_letters
from dials_jax.studies.study_records import study_records

IMPORTANCE_LEGEND = (
    ("loss", "Mean absolute difference in cross-entropy to the heavy model, nats: Sedykh (6)."),
    ("gap", "Cross-entropy above the heavy model's, nats: below 0 the model is the better one."),
    ("kl", "KL divergence of the model from the heavy one, nats: Sedykh (7)."),
    ("relative_kl", "The same, minus that of a second heavy model, sequence by sequence."),
    ("lowest t, highest t", "The curve where least and where most is masked."),
    ("peak", "Its largest value, ± half its 95 % interval, and the noise level t of it."),
    ("what schedules would lose", "Integrals over the steps that they give to other models, nats "
     "per token, on masked text. That later steps build on a light model's tokens is left out."),
)  # fmt: skip


def _print_estimate(
    cfg: ImportanceStudy, models: Mapping[str, Model], length: int, num_times: int
) -> None:
    """Says what the noise levels will take that are left. Args: length: tokens of a sequence."""
    if not num_times:
        return
    configs = [model.config for model in models.values()]
    batch = -(-cfg.batch_size // sharding.num_batch_shards(next(iter(models.values())).mesh))
    count = num_times * cfg.num_sequences
    memory = {
        "weights": sum(device_bytes(model.params) for model in models.values()),
        "activations": max(activation_bytes(each, batch, length, length) for each in configs),
    }
    flops = count * sum(forward_flops(each, length) for each in configs)
    print_cost("noise levels", RunEstimate(count * length, flops, memory), "lower batch_size")


def run_importance(cfg: ImportanceStudy, workdir: Path) -> Report:
    """Measures the curves of Sedykh, Figures 5 and 6, and predicts what schedules would lose."""
    schedules = [Schedule.parse(text) for text in cfg.schedules]
    require_known_letters(schedules, [letter for letter, _ in cfg.models])
    mesh = sharding.make_mesh(cfg.mesh)
    models = {letter: load(path, cfg.dtype, mesh, cfg.layout) for letter, path in cfg.models}
    heavy = models.pop(cfg.heavy)
    check_family(heavy.config, {letter: model.config for letter, model in models.items()})
    tokens, data = clean_sequences(cfg, heavy)
    weights = {letter: model.fingerprint for letter, model in models.items()}
    weights |= {cfg.heavy: heavy.fingerprint, "data": data}
    records = study_records(cfg, weights, workdir, partial(_check_time, letters=set(models)))
    done = {record["time"] for record in records.all}
    every = {cfg.heavy: heavy} | models
    _print_estimate(cfg, every, tokens.shape[1], len(cfg.times) - len(done))
    with progress_bar(len(cfg.times), len(done), "noise levels", "time") as bar:
        for time in (t for t in cfg.times if t not in done):
            found = divergences(
                heavy, models, tokens, time, seed=cfg.seed, batch_size=cfg.batch_size
            )
            records.add({"time": time, "models": {k: _to_lists(v) for k, v in found.items()}})
            bar.update()
    measured_at = {record["time"]: record["models"] for record in records.all}
    by_letter = {
        letter: [_from_lists(measured_at[t][letter]) for t in cfg.times] for letter in models
    }
    results = {
        "kind": type(cfg).__name__,
        "config": to_dict(cfg),
        "environment": environment(heavy, cfg.seed),
        "num_layers": {cfg.heavy: heavy.num_layers}
        | {letter: model.num_layers for letter, model in models.items()},
        "curves": curve_results(compute_curves(cfg.times, by_letter, cfg.second_heavy)),
    }
    predicted = predict_losses(schedules, cfg.times, by_letter)
    results["predicted"] = as_dicts(predicted)
    tables = {"Curves": curve_table(results["curves"])}
    figures = importance_figures(results, cfg)
    if predicted:
        tables["What schedules would lose"] = prediction_table(predicted)
        figures += prediction_figures(predicted)
    return study_report(
        "Importance of denoising steps",
        results,
        curve_rows(results["curves"]),
        tables,
        IMPORTANCE_LEGEND,
        figures,
        "\n".join(table.text() for table in tables.values()),
    )


def clean_sequences(cfg: ImportanceStudy, heavy: Model) -> tuple[Int[np.ndarray, "N T"], str]:
    """Draws sequences of the data by the seed; also returns the data's fingerprint."""
    data, _ = load_training_data(cfg.data, heavy.config, heavy.path)
    require(
        data.num_rows >= cfg.num_sequences,
        f"the data has {data.num_rows} rows, fewer than num_sequences={cfg.num_sequences}; "
        "lower it or add text",
    )
    random = random_generator("step importance", cfg.seed)
    chosen = np.sort(random.choice(data.num_rows, cfg.num_sequences, replace=False))
    tokens, answer, valid = data.rows(chosen)
    require(
        valid is None and bool(answer.all()),
        "the importance study masks whole sequences; give text data with prompt_length=0",
    )
    return tokens, data.fingerprint


def _check_time(record: Any, letters: set[str]) -> None:
    """Checks the record of a noise level.

    Raises: ValueError, TypeError or KeyError for anything else.
    """
    require_numbers([record["time"]])
    if record["models"].keys() != letters:
        raise ValueError(f"models are {sorted(record['models'])}")
    for found in record["models"].values():
        for name in Divergence._fields:
            require_numbers(found[name])


def _to_lists(divergence: Divergence) -> dict[str, list[float]]:
    return {name: np.asarray(x, float).tolist() for name, x in divergence._asdict().items()}


def _from_lists(stored: dict[str, list[float | None]]) -> Divergence:
    return Divergence(**{name: np.array(values, float) for name, values in stored.items()})


# --------------------------------------------------------------------------- tables and figures


def curve_results(curves: Mapping[str, Mapping[str, Curve]]) -> dict[str, Any]:
    """The curves as results.json holds them."""
    return {
        quantity: {
            letter: {name: x.tolist() for name, x in curve._asdict().items()}
            for letter, curve in by_letter.items()
        }
        for quantity, by_letter in curves.items()
    }


def curve_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of results.csv: one per quantity, model and time."""
    return [
        {"quantity": quantity, "model": letter, "time": t, "value": value, "low": low, "high": high}
        for quantity, by_letter in results.items()
        for letter, curve in by_letter.items()
        for t, value, low, high in zip(
            curve["times"], curve["value"], curve["low"], curve["high"], strict=True
        )
    ]


def curve_table(results: Mapping[str, Any]) -> Table:
    """Makes a table with a line per quantity and model: the curve's ends and its peak."""
    lines = []
    for quantity, by_letter in results.items():
        for letter, curve in by_letter.items():
            peak = int(np.argmax(curve["value"]))
            half = (curve["high"][peak] - curve["low"][peak]) / 2
            lines.append(
                (
                    f"{quantity} {letter}",
                    f"{curve['value'][0]:.4f}",
                    f"{curve['value'][peak]:.4f} ±{half:.4f}",
                    f"{curve['times'][peak]:.3f}",
                    f"{curve['value'][-1]:.4f}",
                )
            )
    return Table(("curve", "lowest t", "peak", "at t", "highest t"), lines)


def importance_figures(results: Mapping[str, Any], cfg: ImportanceStudy) -> list[Figure]:
    """One figure per quantity, as in Sedykh, Figures 5 and 6."""
    depths, figures = results["num_layers"], []
    for quantity, by_letter in results["curves"].items():
        data = {
            "curves": {
                letter: Curve(*(np.array(x) for x in curve.values()))
                for letter, curve in by_letter.items()
            },
            "labels": {letter: _label(letter, cfg, depths) for letter in by_letter},
            "ylabel": plots.CURVE_LABELS[quantity],
        }
        caption = f"{dict(IMPORTANCE_LEGEND)[quantity]} Bands are 95 % intervals over sequences."
        figures.append(Figure(quantity, caption, plots.importance_curves, data))
    return figures


def _label(letter: str, cfg: ImportanceStudy, depths: Mapping[str, int]) -> str:
    """Labels a model by its depth; models of equal depth also by the names of their folders."""
    paths = dict(cfg.models)
    label = f"{letter}: {depths[letter]} blocks"
    if letter == cfg.second_heavy:
        return f"{label}, another seed"
    twins = [x for x in paths if x != cfg.second_heavy and depths[x] == depths[letter]]
    return label if len(twins) == 1 else f"{label}, {Path(paths[letter]).name}"
