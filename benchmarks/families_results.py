"""What `benchmarks.families` keeps of trainings, sweeps and studies: numbers for its page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from dials_jax.config import TrainConfig
from dials_jax.models.folders import read_info
from dials_jax.reporting.retention import CHOSEN
from dials_jax.studies.profile import Profile
from dials_jax.studies.representation_tables import change_by_reach, recency_ratio


def training_facts(folder: Path, cfg: TrainConfig) -> dict[str, Any]:
    """How long a training took by its own log, and the loss along it."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    row, seconds, before = cfg.batch_size * cfg.data.length, 0.0, 0
    for line in lines:
        if "tokens_per_second" in line:  # not where a step was compiled and no other was taken
            seconds += (line["step"] - before) * row / line["tokens_per_second"]
        before = line["step"]
    model = folder / "model" / "config.json"
    return {
        "steps": before,
        "seconds": seconds,
        "parameters": read_info(model.parent).parameters if model.exists() else None,
        "log": [[line["step"], line["loss"]] for line in lines],
    }


def losses_of(results: dict[str, Any]) -> dict[str, Any]:
    """Nats per token of each text: of the whole model, and without each of its layers."""
    runs = results["runs"]
    # By layers, not by label: a layer that Algorithm 1 chose, too, has one run under its label.
    without = {
        tuple(run["policy"]["layers"]): run for run in runs if run["policy"]["kind"] == "static"
    }
    layers = range(results["model"]["num_layers"])
    return {
        "full": _items(next(run for run in runs if run["policy"]["kind"] == "full")),
        "without": [_items(without[layer,]) for layer in layers],
    }


def _items(run: dict[str, Any]) -> list[float]:
    return [round(run["items"][name], 6) for name in sorted(run["items"])]


def retention_of(results: dict[str, Any]) -> dict[str, Any]:
    """Nats per token of each text without the k layers that Algorithm 1 chose."""
    found = []
    for run in results["runs"]:
        policy = run["policy"]
        if policy["label"].startswith(CHOSEN):
            chosen = {"k": policy["num_skipped"], "adjacent": policy.get("adjacent", False)}
            found.append(chosen | {"layers": policy["layers"], "nats": _items(run)})
    return {"chosen": found}


def skips_of(results: dict[str, Any]) -> dict[str, Any]:
    """The share of model calls in which routers left out each layer, by label of the policy."""
    found = {}
    for run in results["runs"]:
        if run["policy"]["kind"] == "routed":
            executed, calls = (np.sum(run["execution"][n], axis=0) for n in ("executed", "rows"))
            nats = float(np.mean(list(run["items"].values())))
            found[run["policy"]["label"]] = {
                "skips": np.round(1 - executed / calls, 6).tolist(),
                "nats": nats,
            }
    return {"routed": found}


def summarise(profile: Profile) -> dict[str, Any]:
    """Cosines per sequence and layer, means by step, the change by distance, and sinks."""

    def rounded(values: np.ndarray) -> list[Any]:
        return np.round(values, 6).tolist()

    answer = profile.positions >= 0
    changes: dict[str, Any] = {}
    if profile.facts.change_layers:
        changes = {
            "distances": profile.distances.tolist(),
            "change": rounded(profile.change.mean),
            "change_near": rounded(change_by_reach(profile)["next to it"]),
            "recency_ratio": rounded(recency_ratio(profile)),
        }
    return {
        "label": profile.facts.label,
        "layer": rounded(profile.sequence_layer),
        "token": rounded(profile.sequence_token),
        "end": rounded(profile.end_token),
        "prompt_layer": rounded(profile.prompt_layer),
        "layer_by_step": rounded(profile.layer_cosine.pooled(2).mean),
        "norm": rounded(np.nanmean(profile.norm.mean[:, :, answer], axis=(0, 2))),
        "change_layers": list(profile.facts.change_layers),
        **changes,
        "sinks": int(profile.sinks.sum()),
        "seconds": profile.seconds,
    }
