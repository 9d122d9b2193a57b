"""The static policies of a sweep: layers that Goel, Algorithm 1 chooses, and given ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dials_jax import trees
from dials_jax.errors import require
from dials_jax.estimates import print_cost
from dials_jax.evaluation.calibration import CalibrationPrompts
from dials_jax.evaluation.candidates import Candidate
from dials_jax.evaluation.items import items_digest
from dials_jax.evaluation.request_cost import LOWER_BATCH_SIZE, likelihood_cost
from dials_jax.evaluation.sweep_records import SweepRecords
from dials_jax.evaluation.task import EvalConfig, EvalTask
from dials_jax.models.model import Model
from dials_jax.reporting.retention import chosen_label
from dials_jax.skipping.policies import Static, StaticGates
from dials_jax.skipping.similarity import (
    choice_shares,
    choose_static_layers,
    prompt_similarities,
    require_enough_layers,
)

MOST_STATIC_PROGRAMS = 3  # with unrolled layers, more static sets than these share one program


def check_static(cfg: EvalConfig, num_layers: int) -> None:
    """Raises: InputError for more layers than can be skipped, and for layers that are not there."""
    for k in cfg.num_static:
        for allow_adjacent in cfg.allow_adjacent:
            require_enough_layers(k, num_layers, allow_adjacent)
    for layers in cfg.static_layers:
        require(
            bool(layers) and all(0 <= layer < num_layers for layer in layers),
            f"static_layers: {layers} must name layers of the model, counted from 0 to "
            f"{num_layers - 1}; papers count from 1: write their {{5, 7}} as (4, 6)",
        )


def static_labels(cfg: EvalConfig) -> list[str]:
    """Those of the static policies, if the algorithm reaches every number of layers."""
    labels = [chosen_label(k, adjacent) for k, adjacent in _choices(cfg)]
    return [*labels, *map(_set_label, cfg.static_layers)]


def static_placeholder(cfg: EvalConfig) -> list[Candidate]:
    """Stands for the static policies in checks, before their layers are chosen."""
    return [Candidate(label, Static(())) for label in static_labels(cfg)[:1]]


def num_static_policies(cfg: EvalConfig) -> int:
    """How many there are if the algorithm reaches every number of layers."""
    return len(list(_choices(cfg))) + len(cfg.static_layers)


def static_candidates(
    cfg: EvalConfig,
    model: Model,
    task: EvalTask,
    calibration: CalibrationPrompts | None,
    records: SweepRecords,
) -> list[Candidate]:
    """The static policies: with layers chosen by Goel, Algorithm 1, then with those of the sweep.

    The algorithm may not reach every number of layers, which is said. Two policies may skip the
    same layers, as both kinds of k=1 do: they share what was scored.
    """
    chosen: list[tuple[str, tuple[int, ...], dict[str, Any]]] = []
    notes = {}
    if calibration is not None:
        mean = _similarities(cfg, model, task, calibration, records)["similarities"]
        notes = {"calibration": calibration.source}
    for k, adjacent in _choices(cfg):
        label = chosen_label(k, adjacent)
        layers = choose_static_layers(mean, k, cfg.similarity_threshold, adjacent)
        if len(layers) == k:
            chosen.append((label, layers, {"adjacent": True} if adjacent else {}))
        else:
            print(f"{task.name}: Goel, Algorithm 1 finds only {len(layers)} layers; no {label}")
    given = {_set_label(layers): tuple(sorted(set(layers))) for layers in cfg.static_layers}
    sets = [*chosen, *((label, layers, {}) for label, layers in given.items())]
    return [
        Candidate(
            label,
            _static_policy(model, layers, len(sets)),
            {"layers": list(layers), "num_skipped": len(layers), **kind},
            {} if label in given else notes,
        )
        for label, layers, kind in sets
    ]


def describe_choice(
    cfg: EvalConfig, task: EvalTask, calibration: CalibrationPrompts, records: SweepRecords
) -> dict[str, Any]:
    """What Goel, Algorithm 1 saw on a task, for results.json.

    Returns: `source` of the prompts, the mean `similarities` of the layers, and `shares`: by the
      label of each policy, the share of prompts whose own choice holds each layer (Goel, Figure 8).
    """
    found = records.similarities[_where(task, calibration, records)]
    by_prompt = np.array(found["by_prompt"])
    shares = {
        chosen_label(k, adjacent): choice_shares(
            by_prompt, k, cfg.similarity_threshold, adjacent
        ).tolist()
        for k, adjacent in _choices(cfg)
    }
    return {
        "source": calibration.source,
        "similarities": found["similarities"],
        "num_prompts": len(by_prompt),
        "shares": shares,
    }


def _choices(cfg: EvalConfig) -> Iterator[tuple[int, bool]]:
    """How many layers are chosen, and whether neighbours may be."""
    return ((k, adjacent) for adjacent in cfg.allow_adjacent for k in cfg.num_static)


def _set_label(layers: Sequence[int]) -> str:
    return f"static {{{', '.join(map(str, sorted(set(layers))))}}}"


def _static_policy(model: Model, layers: Sequence[int], num_sets: int) -> Static | StaticGates:
    """Many sets share a program, and so do all where `Static` has a branch per layer anyway."""
    if trees.is_unrolled(model.params["layers"]) and num_sets <= MOST_STATIC_PROGRAMS:
        return Static(layers)
    return StaticGates.of(layers, model.num_layers)


def _where(
    task: EvalTask, calibration: CalibrationPrompts, records: SweepRecords
) -> tuple[str, str]:
    return records.names[task.name], items_digest(calibration.items)


def _similarities(
    cfg: EvalConfig,
    model: Model,
    task: EvalTask,
    calibration: CalibrationPrompts,
    records: SweepRecords,
) -> Mapping[str, Any]:
    """The record of the similarities on the calibration prompts, found or measured.

    Earlier versions stored their mean alone. It stays: measured again in other batches, it could
    lead to other layers.
    """
    where = _where(task, calibration, records)
    known = records.similarities.get(where, {})
    if "by_prompt" not in known:
        if calibration.of_test:
            print(f"{task.name}: static layers are chosen on {calibration.source}")
        length = max(len(answer) for item in calibration.items for answer in item.answers)
        prompts = [item.prompt for item in calibration.items if item.prompt]
        pairs = [(len(prompt), 0 if model.config.causal else length, 1) for prompt in prompts]
        label = f"{task.name}, similarity of layers on {len(prompts)} prompts"
        print_cost(label, likelihood_cost(model, pairs, 0.0, cfg.batch_size), LOWER_BATCH_SIZE)
        found = prompt_similarities(model, prompts, length, cfg.batch_size)
        mean = known.get("similarities") or found.mean(axis=0).tolist()
        new = {"similarities": mean, "by_prompt": found.tolist()}
        records.add({"task": where[0], "prompts": where[1], **new})
    return records.similarities[where]
