"""What `benchmarks.families` keeps of trainings, sweeps and studies: numbers for its page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from dials_jax.config import RepresentationStudy, TrainConfig
from dials_jax.data.sources import load_training_data
from dials_jax.loading import load
from dials_jax.models.folders import read_info
from dials_jax.sharding import make_mesh
from dials_jax.studies.profile import Profile
from dials_jax.studies.trajectories import profile_model


def training_facts(folder: Path, cfg: TrainConfig) -> dict[str, Any]:
    """How long a training took by its own log, and the loss along it."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    row, seconds, before = cfg.batch_size * cfg.data.length, 0.0, 0
    for line in lines:
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
    runs = {run["policy"]["label"]: run for run in results["runs"]}
    names = sorted(runs["full"]["items"])
    layers = range(results["model"]["num_layers"])

    def items(label: str) -> list[float]:
        return [round(runs[label]["items"][name], 6) for name in names]

    return {
        "full": items("full"),
        "random": items("random k=1"),
        "without": [items(f"static {{{layer}}}") for layer in layers],
    }


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


def measure_profile(cfg: RepresentationStudy) -> Profile:
    """The profile of a study's one model, on prompts that are the first tokens of rows of text."""
    ((label, path),) = cfg.models
    model = load(path, cfg.dtype, make_mesh(cfg.mesh), cfg.layout)
    rows, _ = load_training_data(cfg.data, model.config, model.path)
    tokens = rows.rows(np.arange(min(cfg.num_prompts, rows.num_rows)))[0]
    return profile_model(
        model,
        tokens[:, : cfg.data.prompt_length].tolist(),
        cfg.sampler_of(model.config),
        observer=cfg.observer_of(model.config),
        batch_size=cfg.batch_size,
        label=label,
        seed=cfg.seed,
    )


def summarise(profile: Profile) -> dict[str, Any]:
    """Cosines per sequence and layer, means by step, the change by distance, and sinks."""

    def rounded(values: np.ndarray) -> list[Any]:
        return np.round(values, 6).tolist()

    answer = profile.positions >= 0
    return {
        "causal": profile.facts.family == "causal",
        "layer": rounded(profile.sequence_layer),
        "token": rounded(profile.sequence_token),
        "prompt_layer": rounded(profile.prompt_layer),
        "layer_by_step": rounded(profile.layer_cosine.pooled(2).mean),
        "norm": rounded(np.nanmean(profile.norm.mean[:, :, answer], axis=(0, 2))),
        "change_layers": list(profile.facts.change_layers),
        "distances": profile.distances.tolist() if profile.change.mean.size else [],
        "change": rounded(profile.change.mean),
        "sinks": int(profile.sinks.sum()),
        "seconds": profile.seconds,
    }
