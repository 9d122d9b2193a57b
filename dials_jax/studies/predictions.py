"""Predicts what schedules would lose, from the measured importance of their steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from dials_jax.errors import require
from dials_jax.reporting.publish import Figure, Table
from dials_jax.sampling.model_schedule import Schedule
from dials_jax.statistics import mean_interval
from dials_jax.studies import plots
from dials_jax.studies.divergence import Divergence
from dials_jax.studies.search import time_weights


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a schedule would lose, in nats per token, with 95 % intervals over sequences.

    `gap` is the loss in likelihood bound, `kl` bounds the divergence from the heavy model's
    samples. Both assume that partially generated text is distributed like masked real text.
    """

    schedule: str
    quantity: str  # gap or kl
    value: float
    low: float
    high: float
    difference: float  # to the first schedule, sequence by sequence
    difference_low: float
    difference_high: float


def predict_losses(
    schedules: Sequence[Schedule],
    times: Sequence[float],
    measured: Mapping[str, Sequence[Divergence]],
) -> list[Prediction]:
    """Integrates the differences over the times at which each schedule runs other models.

    Args:
      measured: by letter, of every model but the heavy one, at each time.
    """
    rows = []
    for quantity, field in {"gap": "loss_gap", "kl": "kl"}.items():
        values = {
            letter: np.array([getattr(divergence, field) for divergence in found])
            for letter, found in measured.items()
        }
        harms = [_predict_harm(schedule, times, values) for schedule in schedules]
        whole = np.isfinite(np.sum(harms, axis=0))  # sequences with a masked token at every time
        require(
            not schedules or int(whole.sum()) > 1,
            "schedules: fewer than two sequences have a masked token at every time; "
            "leave out schedules, or measure more sequences at fewer times elsewhere",
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


def _predict_harm(
    schedule: Schedule, times: Sequence[float], values: Mapping[str, Float[np.ndarray, "G N"]]
) -> Float[np.ndarray, "N"]:
    """The integral per sequence; `values` are per time and sequence, by letter of the model."""
    letters = np.array(list(schedule.each_step))
    parts = [time_weights(np.asarray(times), letters == x) @ found for x, found in values.items()]
    return np.sum(parts, axis=0)


def prediction_table(rows: Sequence[Prediction]) -> Table:
    """Makes a table with a line per quantity and schedule."""
    header = ("predicted, nats per token", "value", "above the first", "95 % interval")
    lines = [
        (
            f"{r.quantity} {r.schedule}",
            f"{r.value:.4f} ±{(r.high - r.low) / 2:.4f}",
            f"{r.difference:+.4f}",
            f"{r.difference_low:+.4f} to {r.difference_high:+.4f}",
        )
        for r in rows
    ]
    return Table(header, lines)


def prediction_figures(rows: Sequence[Prediction]) -> list[Figure]:
    """One figure per quantity."""
    figures = []
    for quantity in ("gap", "kl"):
        found = [r for r in rows if r.quantity == quantity]
        data = {
            "labels": [r.schedule for r in found],
            "values": np.array([r.value for r in found]),
            "intervals": np.array([[r.low for r in found], [r.high for r in found]]),
            "label": f"predicted: {plots.CURVE_LABELS[quantity]} per token",
        }
        caption = f"The integral of {quantity} over the steps that are light."
        figures.append(Figure(f"predicted_{quantity}", caption, plots.schedule_points, data))
    return figures
