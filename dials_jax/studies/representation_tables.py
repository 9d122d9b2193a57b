"""The numbers of profiles as tables, rows and results: by depth, with intervals over sequences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from dials_jax.config import to_dict
from dials_jax.reporting.publish import Table
from dials_jax.statistics import mean_interval
from dials_jax.studies.profile import Profile

DEPTHS = ("first quarter", "second", "third", "last")
# Distances to the nearest token that the step before decoded, both ends included.
REACHES = {"the token": (0, 0), "next to it": (1, 1), "2 to 4": (2, 4), "5 to 16": (5, 16)}
FARTHER = "farther"
TOP_SINKS = 3

LEGEND = (
    ("cosine of consecutive layers", "Of what enters and leaves a layer, over the answer and all "
     "model calls of a sequence: Goel, Figures 3 to 5. Intervals are of 95 % over sequences."),
    ("cosine of neighbouring positions", "Of a hidden state at positions i and i + 1 of answers: "
     "Goel, Figures 6 and 9 to 14. Low values are what the paper calls recency bias."),
    ("norm", "L2 norm of hidden states over all steps and positions: Goel, Figure 7."),
    ("sinks", "Share of states whose norm exceeds the median of their sequence, layer and call "
     "`sink_factor` times, and the positions where that happens most; the answer starts at 0."),
    ("change", "1 - cosine of a position's states in two calls of its sequence that follow each "
     "other, by distance to the nearest token that the former call decoded."),
    ("near / far", "Change next to a decoded token over change farther than 16 positions away, or "
     "than the farthest row that has values: 1 without any recency bias."),
)  # fmt: skip


def quarters(num_layers: int) -> list[Int[np.ndarray, "_"]]:
    """The layers of each quarter of the depth."""
    return np.array_split(np.arange(num_layers), 4)


def profile_tables(profiles: Mapping[str, Profile]) -> dict[str, Table]:
    """The tables of the report, by heading."""
    tables = {
        "Cosine of consecutive layers": _by_quarter(
            {x: p.sequence_layer for x, p in profiles.items()}
        ),
        "Cosine of neighbouring positions": _by_quarter(
            {x: p.sequence_token[:, 1:] for x, p in profiles.items()}
        ),
        "Norms and sinks": norm_table(profiles),
    }
    denoising = {x: p for x, p in profiles.items() if p.change.count.sum() > 0}
    if denoising:
        tables["Change by distance to what was just decoded"] = change_table(denoising)
    return tables


def _by_quarter(values: Mapping[str, Float[np.ndarray, "N L"]]) -> Table:
    """A line per model: means over the quarters of its depth."""
    lines = []
    for label, by_sequence in values.items():
        parts = [*quarters(by_sequence.shape[1]), slice(None)]
        lines.append((label, *(_with_interval(by_sequence[:, part]) for part in parts)))
    return Table(("model", *DEPTHS, "all"), lines)


def _with_interval(values: Float[np.ndarray, "N _"]) -> str:
    values = values[np.isfinite(values).all(axis=1)]
    if not values.size:
        return "-"
    means = values.mean(axis=1)
    low, high = mean_interval(means)
    return f"{means.mean():.3f} ±{(high - low) / 2:.3f}"


def norm_table(profiles: Mapping[str, Profile]) -> Table:
    """A line per model: mean norms at the ends of quarters, and its sinks."""
    header = ("model", "embedding", "after a quarter", "a half", "three quarters", "all layers",
              "largest", "sinks", "at")  # fmt: skip
    lines = []
    for label, profile in profiles.items():
        norm = profile.norm.pooled((0, 2)).mean
        ends = [0, *(part[-1] + 1 if len(part) else 0 for part in quarters(profile.num_layers))]
        share = profile.sinks.sum() / profile.norm.count.sum()
        places = ", ".join(f"{sink['position']:+d}" for sink in top_sinks(profile)) or "-"
        cells = [f"{norm[i]:.1f}" for i in ends]
        lines.append((label, *cells, f"{profile.largest_norm.max():.1f}", f"{share:.2%}", places))
    return Table(header, lines)


def top_sinks(profile: Profile, count: int = TOP_SINKS) -> list[dict[str, Any]]:
    """The positions that are sinks most often: where, how often, and in which hidden state."""
    often = profile.sinks.sum(axis=0)
    order = np.argsort(-often, kind="stable")[:count]
    total = profile.norm.count.sum(axis=(0, 1))
    return [
        {
            "position": int(profile.positions[at]),
            "share": float(often[at] / total[at]),
            "state": int(profile.sinks[:, at].argmax()),
            "largest_norm": float(profile.largest_norm[:, at].max()),
        }
        for at in order
        if often[at]
    ]


def change_by_reach(profile: Profile) -> dict[str, Float[np.ndarray, "K"]]:
    """The mean change at each of `REACHES`, and beyond; NaN without values."""
    distance = np.abs(profile.distances)
    chosen = {name: (distance >= a) & (distance <= b) for name, (a, b) in REACHES.items()}
    chosen[FARTHER] = distance > REACHES["5 to 16"][1]
    change = profile.change
    found = {}
    for name, here in chosen.items():
        count, mean = change.count[:, here], np.nan_to_num(change.mean[:, here])
        total = count.sum(axis=1)
        values = (count * mean).sum(axis=1) / np.where(total > 0, total, 1)
        found[name] = np.where(total > 0, values, np.nan)
    return found


def recency_ratio(profile: Profile) -> Float[np.ndarray, "K"]:
    """Change next to a decoded token over that far from it, after each of `change_layers`."""
    reach = change_by_reach(profile)
    far = reach[FARTHER]
    for name in ("5 to 16", "2 to 4"):  # short answers have no farther positions
        far = np.where(np.isnan(far), reach[name], far)
    return reach["next to it"] / np.where(far > 0, far, np.nan)


def change_table(profiles: Mapping[str, Profile]) -> Table:
    """A line per model and layer."""
    lines = []
    for label, profile in profiles.items():
        reach, ratio = change_by_reach(profile), recency_ratio(profile)
        for i, layer in enumerate(profile.facts.change_layers):
            cells = [_shown(reach[name][i], ".4f") for name in (*REACHES, FARTHER)]
            lines.append((f"{label}, layer {layer}", *cells, _shown(ratio[i], ".2f")))
    return Table(("model", *REACHES, FARTHER, "near / far"), lines)


def _shown(value: float, form: str) -> str:
    return "-" if np.isnan(value) else format(value, form)


# ----------------------------------------------------------------------------------- rows, results


def profile_rows(profiles: Mapping[str, Profile]) -> list[dict[str, Any]]:
    """The rows of results.csv: one per model, quantity and layer or hidden state."""
    rows = []
    for label, profile in profiles.items():
        quantities = {
            "layer_cosine": profile.sequence_layer,
            "token_cosine": profile.sequence_token,
            "token_cosine_at_end": profile.end_token,
            "prompt_layer_cosine": profile.prompt_layer,
        }
        for quantity, by_sequence in quantities.items():
            for layer, values in enumerate(by_sequence.T):
                values = values[np.isfinite(values)]
                value = values.mean() if len(values) else np.nan
                low, high = mean_interval(values) if len(values) else (np.nan, np.nan)
                rows.append(_row(label, quantity, layer, value, low, high))
        norm = profile.norm.pooled((0, 2)).mean
        rows += [_row(label, "norm", i, x, np.nan, np.nan) for i, x in enumerate(norm)]
        ratios = zip(profile.facts.change_layers, recency_ratio(profile), strict=True)
        rows += [_row(label, "recency", layer, x, np.nan, np.nan) for layer, x in ratios]
    return rows


def _row(
    label: str, quantity: str, layer: int, value: float, low: float, high: float
) -> dict[str, Any]:
    return {
        "model": label, "quantity": quantity, "layer": layer, "value": float(value),
        "low": float(low), "high": float(high),
    }  # fmt: skip


def profile_results(profile: Profile) -> dict[str, Any]:
    """What results.json says of a model; the arrays are in its profile."""
    reach = change_by_reach(profile)
    return {
        **to_dict(profile.facts),
        "num_layers": profile.num_layers,
        "num_sequences": profile.num_sequences,
        "seconds": profile.seconds,
        "layer_cosine": profile.over_sequences(profile.sequence_layer).tolist(),
        "token_cosine": profile.over_sequences(profile.sequence_token).tolist(),
        "token_cosine_at_end": profile.over_sequences(profile.end_token).tolist(),
        "norm": profile.norm.pooled((0, 2)).mean.tolist(),
        "sinks": top_sinks(profile),
        "change": {name: values.tolist() for name, values in reach.items()},
        "recency": recency_ratio(profile).tolist(),
    }
