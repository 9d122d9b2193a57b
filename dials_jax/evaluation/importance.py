"""How far models are from a heavy one at each noise level, and what schedules would lose."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from dials_jax import sharding
from dials_jax.analysis import study_plots as plots
from dials_jax.analysis.schedule_search import time_weights
from dials_jax.analysis.step_importance import (
    Curve,
    Divergence,
    check_family,
    curves,
    divergences,
)
from dials_jax.config import ImportanceStudy, require, to_dict
from dials_jax.data.batches import generator
from dials_jax.data.sources import training_data
from dials_jax.evaluation.results import Outcome, Records, environment, identity
from dials_jax.evaluation.sampled import require_known
from dials_jax.evaluation.statistics import mean_interval
from dials_jax.evaluation.study_report import as_dicts, table, write
from dials_jax.loading import load
from dials_jax.models.model import Model
from dials_jax.sampling.schedule import Schedule

CURVE_LABELS = {
    "loss": "|difference in cross-entropy|, nats",
    "gap": "cross-entropy above the heavy model's, nats",
    "kl": "KL(heavy || model), nats",
    "relative_kl": "KL(heavy || model),\nless a second heavy model's, nats",
}


def run_importance(cfg: ImportanceStudy, workdir: Path) -> Outcome:
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
        "curves": curve_results(curves(cfg.times, by_letter, cfg.heavy2)),
    }
    predicted = predictions(schedules, cfg.times, by_letter)
    results["predicted"] = as_dicts(predicted)

    def publish():
        write(results, curve_rows(results["curves"]), workdir)
        plot_importance(results, cfg, workdir / "plots")
        print(curve_table(results["curves"]))
        if predicted:
            plot_predictions(predicted, workdir / "plots")
            print(prediction_table(predicted))

    return results, publish


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


# --------------------------------------------------------------------------- tables and figures


def curve_results(curves: Mapping[str, Mapping[str, Curve]]) -> dict[str, Any]:
    return {
        quantity: {
            letter: {name: x.tolist() for name, x in curve._asdict().items()}
            for letter, curve in by_letter.items()
        }
        for quantity, by_letter in curves.items()
    }


def curve_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a quantity, model and time."""
    return [
        {"quantity": quantity, "model": letter, "time": t, "value": value, "low": low, "high": high}
        for quantity, by_letter in results.items()
        for letter, curve in by_letter.items()
        for t, value, low, high in zip(
            curve["times"], curve["value"], curve["low"], curve["high"], strict=True
        )
    ]


def curve_table(results: Mapping[str, Any]) -> str:
    """Every quantity and model with its peak and its ends."""
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
    return table(("curve", "lowest t", "peak", "at t", "highest t"), lines)


def plot_importance(results: Mapping[str, Any], cfg: ImportanceStudy, folder: Path) -> None:
    depths = results["num_layers"]
    for quantity, by_letter in results["curves"].items():
        shown = {
            letter: Curve(*(np.array(x) for x in curve.values()))
            for letter, curve in by_letter.items()
        }
        labels = {x: _label(x, cfg, depths) for x in shown}
        plots.importance_curves(shown, labels, CURVE_LABELS[quantity], folder / f"{quantity}.png")


def _label(letter: str, cfg: ImportanceStudy, depths: Mapping[str, int]) -> str:
    """Models of equal depth are told apart by the names of their folders."""
    paths = dict(cfg.models)
    label = f"{letter}: {depths[letter]} blocks"
    if letter == cfg.heavy2:
        return f"{label}, another seed"
    twins = [x for x in paths if x != cfg.heavy2 and depths[x] == depths[letter]]
    return label if len(twins) == 1 else f"{label}, {Path(paths[letter]).name}"


# -------------------------------------------------------------------- what schedules would lose


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a schedule would lose, in nats a token, with 95 % intervals over the rows of the data.

    `gap` is the loss in likelihood bound, `kl` bounds the divergence from what the heavy model
    writes; both as far as its path resembles masked text.
    """

    schedule: str
    quantity: str  # gap or kl
    value: float
    low: float
    high: float
    difference: float  # to the first schedule, row by row
    difference_low: float
    difference_high: float


def predictions(
    schedules: Sequence[Schedule],
    times: Sequence[float],
    measured: Mapping[str, Sequence[Divergence]],
) -> list[Prediction]:
    """The integrals of the differences over the times that each schedule gives to other models.

    Args:
      measured: of every letter but the heavy one's, at each time.
    """
    rows = []
    for quantity, field in {"gap": "loss_gap", "kl": "kl"}.items():
        values = {
            letter: np.array([getattr(divergence, field) for divergence in found])
            for letter, found in measured.items()
        }
        harms = [_harm(schedule, times, values) for schedule in schedules]
        whole = np.isfinite(np.sum(harms, axis=0))  # rows that were masked somewhere at each time
        require(
            not schedules or int(whole.sum()) > 1,
            "schedules: fewer than two rows were masked at every time, too few to predict with; "
            "add sequences, or lower num_times",
        )
        for schedule, harm in zip(schedules, harms, strict=True):
            difference = (harm - harms[0])[whole]
            low, high = mean_interval(harm[whole])
            difference_low, difference_high = mean_interval(difference)
            rows.append(
                Prediction(
                    schedule=str(schedule),
                    quantity=quantity,
                    value=float(harm[whole].mean()),
                    low=low,
                    high=high,
                    difference=float(difference.mean()),
                    difference_low=difference_low,
                    difference_high=difference_high,
                )
            )
    return rows


def _harm(
    schedule: Schedule, times: Sequence[float], values: Mapping[str, Float[np.ndarray, "G N"]]
) -> Float[np.ndarray, "N"]:
    letters = np.array(list(schedule.each_step))
    parts = [time_weights(np.asarray(times), letters == x) @ found for x, found in values.items()]
    return np.sum(parts, axis=0)


def prediction_table(rows: Sequence[Prediction]) -> str:
    header = ("predicted, nats a token", "value", "above the first", "95 % interval")
    lines = [
        (
            f"{r.quantity} {r.schedule}",
            f"{r.value:.4f} ±{(r.high - r.low) / 2:.4f}",
            f"{r.difference:+.4f}",
            f"{r.difference_low:+.4f} to {r.difference_high:+.4f}",
        )
        for r in rows
    ]
    return table(header, lines)


def plot_predictions(rows: Sequence[Prediction], folder: Path) -> None:
    for quantity in ("gap", "kl"):
        found = [r for r in rows if r.quantity == quantity]
        plots.schedule_points(
            [r.schedule for r in found],
            np.array([r.value for r in found]),
            np.array([[r.low for r in found], [r.high for r in found]]),
            folder / f"predicted_{quantity}.png",
            label=f"predicted: {CURVE_LABELS[quantity]} a token",
        )
