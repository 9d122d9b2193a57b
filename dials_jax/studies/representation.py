"""The study of representations: the profiles of several models on the same questions (Goel).

The models come one after the other. Each batch of prompts is merged into `profiles/LABEL.npz` as
soon as it is measured, so that a run that was stopped continues with identical numbers.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dials_jax import sharding
from dials_jax.config import CorpusData, Data, ModelConfig, TextData, to_dict
from dials_jax.data.sources import load_data_tokenizer, load_training_data
from dials_jax.errors import require
from dials_jax.estimates import measure_speed, print_cost
from dials_jax.evaluation.items import load_items
from dials_jax.evaluation.request_cost import LOWER_BATCH_SIZE
from dials_jax.evaluation.task import EvalTask
from dials_jax.loading import load, read_config
from dials_jax.models.padding import pad_prompts
from dials_jax.progress import format_duration, progress_bar
from dials_jax.records import Records, require_numbers, require_texts
from dials_jax.reporting.environment import environment
from dials_jax.reporting.publish import Report
from dials_jax.sampling.requests import check_batch
from dials_jax.sampling.sampler import Sampler
from dials_jax.skipping.observing import Observer
from dials_jax.studies.claims import check_claims
from dials_jax.studies.estimate import profile_cost
from dials_jax.studies.profile import (
    Profile,
    ProfileFacts,
    load_profile,
    profile_path,
    save_profile,
)
from dials_jax.studies.report import study_report
from dials_jax.studies.representation_page import (
    PROFILE_LEGEND,
    claim_results,
    profile_table,
    representation_chapters,
)
from dials_jax.studies.representation_tables import (
    LEGEND,
    profile_results,
    profile_rows,
    profile_tables,
)
from dials_jax.studies.settings import RepresentationStudy
from dials_jax.studies.study_records import study_records
from dials_jax.studies.trajectories import Trajectories, prompt_keys


class Plan(NamedTuple):
    """What is measured of one model, known before its weights are read."""

    label: str
    path: str
    config: ModelConfig
    prompts: list[tuple[int, ...]]
    prompt_length: int
    sampler: Sampler
    observer: Observer

    @property
    def digest(self) -> str:
        return hashlib.sha256(repr(self.prompts).encode()).hexdigest()[:16]


def run_representation(cfg: RepresentationStudy, workdir: Path) -> Report:
    """Measures the profiles of all models, except what the workdir holds already.

    Raises: InputError for models or data that would stop the study half-way.
    """
    plans = [make_plan(cfg, label, path) for label, path in cfg.models]
    sharding.on_first_process(lambda: _print_estimates(cfg, plans))
    records = study_records(cfg, {}, workdir, _check_batch)
    profiles, settings = {}, {}
    with progress_bar(len(plans) * cfg.num_prompts, 0, "profiles", "prompt") as bar:
        for plan in plans:
            bar.set_description(plan.label)
            profiles[plan.label], settings = measure_model(cfg, plan, workdir, records, bar.update)
    results = {
        "kind": type(cfg).__name__,
        "config": to_dict(cfg),
        "environment": settings,
        "models": {label: profile_results(profile) for label, profile in profiles.items()},
        "claims": claim_results(check_claims(profiles, cfg.adapted)),
    }
    tables = {"Models": profile_table(profiles), **profile_tables(profiles)}
    report = study_report(
        "Representations",
        results,
        profile_rows(profiles),
        tables,
        (*LEGEND, *PROFILE_LEGEND),
        [],
        "\n\n".join(f"{name}\n{table.text()}" for name, table in tables.items()),
    )
    return dataclasses.replace(
        report, chapters=representation_chapters(profiles, cfg.adapted, cfg.num_decoded)
    )


def measure_model(
    cfg: RepresentationStudy,
    plan: Plan,
    workdir: Path,
    records: Records,
    advance: Callable[[int], Any],
) -> tuple[Profile, Mapping[str, Any]]:
    """The profile of one model, and the environment it was measured in."""
    mesh = sharding.make_mesh(cfg.mesh)
    model = load(plan.path, cfg.dtype, mesh, cfg.layout)
    run = Trajectories(
        model, plan.sampler, plan.observer, plan.prompt_length, cfg.batch_size, plan.label,
        cfg.seed, plan.digest,
    )  # fmt: skip
    profile = stored_profile(workdir, run.facts)
    done = 0 if profile is None else profile.num_sequences
    advance(done)
    keys = prompt_keys(plan.prompts)
    for first in range(done, len(plan.prompts), cfg.batch_size):
        batch = slice(first, first + cfg.batch_size)
        found = run.measure(plan.prompts[batch], keys[batch])
        merged = profile = found if profile is None else profile.merge(found)
        sharding.on_first_process(lambda merged=merged: save_profile(merged, workdir))
        count = found.num_sequences
        records.add(
            {"model": plan.label, "first": first, "sequences": count, "seconds": found.seconds}
        )
        advance(count)
    return profile, environment(model, cfg.seed)


def stored_profile(workdir: Path, facts: ProfileFacts) -> Profile | None:
    """What an earlier run has measured of a model; None if nothing.

    Raises: InputError if it is of other weights or prompts.
    """
    path = profile_path(workdir, facts.label)
    if not path.exists():
        return None
    profile = load_profile(path)
    moved = dataclasses.replace(profile.facts, path=facts.path)
    require(
        moved == facts,
        f"{path} was measured with other weights, prompts or settings; choose another --workdir, "
        "or delete it to measure that model again",
    )
    return profile


def _check_batch(record: Any) -> None:
    """Raises: ValueError, TypeError or KeyError for anything but the record of a batch."""
    require_texts(record["model"])
    require_numbers([record[name] for name in ("first", "sequences", "seconds")])


# -------------------------------------------------------------------------- before weights are read


def make_plan(cfg: RepresentationStudy, label: str, path: str) -> Plan:
    """What is measured of one model.

    Raises: InputError for a model or prompts that cannot be measured so.
    """
    model = read_config(path, cfg.dtype)
    require(
        model.num_layers > 1,
        f"model {label!r} has one layer, so there are no layers to compare; give a deeper one",
    )
    observer, sampler = cfg.observer_of(model), cfg.sampler_of(model)
    observer.check(model.num_layers)
    prompts = load_prompts(cfg, label, model, path)
    longest = max(map(len, prompts))
    total = longest + cfg.gen_length
    require(
        total <= model.max_length,
        f"model {label!r} has {model.max_length} positions, but {longest} tokens of the longest "
        f"prompt and gen_length={cfg.gen_length} make {total}; lower gen_length, or set window=",
    )
    tokens, valid = pad_prompts(prompts, longest, model.pad_id)
    check_batch(model, tokens, valid, sampler)
    return Plan(label, path, model, prompts, longest, sampler, observer)


def load_prompts(
    cfg: RepresentationStudy, label: str, model: ModelConfig, path: str
) -> list[tuple[int, ...]]:
    """The first prompts of the data, as the model's tokenizer writes them.

    Raises: InputError for too few of them, and for one that is shorter than the window.
    """
    found = _read_prompts(cfg.data, cfg.num_prompts, cfg.window, model, path)
    require(
        len(found) == cfg.num_prompts,
        f"the data has {len(found)} prompts, fewer than num_prompts={cfg.num_prompts}; lower it "
        "or add data",
    )
    for number, prompt in enumerate(found if cfg.window else ()):
        require(
            len(prompt) == cfg.window,
            f"prompt {number} has {len(prompt)} tokens for model {label!r}, fewer than "
            f"window={cfg.window}; lower it, or leave such prompts out of the data",
        )
    return found


def _read_prompts(
    data: Data, count: int, window: int | None, model: ModelConfig, path: str
) -> list[tuple[int, ...]]:
    if isinstance(data, TextData | CorpusData):
        rows, _ = load_training_data(data, model, path)
        tokens = rows.rows(np.arange(min(count, rows.num_rows)))[0]
        length = data.prompt_length if window is None else window
        return [tuple(row[:length].tolist()) for row in tokens]
    task = EvalTask(name="representation", metric="exact_match", data=data, limit=count)
    items = load_items(task, load_data_tokenizer(data, path), model)
    start = None if window is None else -window
    return [item.prompt[start:] for item in items]


def _print_estimates(cfg: RepresentationStudy, plans: list[Plan]) -> None:
    speeds = {dtype: measure_speed(dtype) for dtype in {plan.config.dtype for plan in plans}}
    for plan in plans:
        cost, seconds = profile_cost(
            plan.config, plan.sampler, plan.observer, plan.prompt_length, cfg.num_prompts,
            cfg.batch_size, cfg.mesh, speeds[plan.config.dtype],
        )  # fmt: skip
        label = f"{plan.label}: about {format_duration(seconds)} without compiling"
        print_cost(label, cost, LOWER_BATCH_SIZE)
