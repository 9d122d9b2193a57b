"""The model, policy, cache and sampler that options name."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args

from dials_jax.caching.parse import parse_cache
from dials_jax.cli.options import SAMPLING
from dials_jax.config import MeshConfig, shown
from dials_jax.config.choices import parse_choice
from dials_jax.errors import require
from dials_jax.evaluation.harness import HarnessModel, load_harness_model, tokenizer_path
from dials_jax.evaluation.task import SamplerConfig
from dials_jax.models.model import Model
from dials_jax.text import find_template


def open_model(given: argparse.Namespace, is_chat: bool) -> tuple[Model, dict[str, Any]]:
    """Loads the model; returns it with the arguments of `text_job` that the options stand for.

    Args:
      is_chat: a chat template is needed; without one nothing is loaded.

    Raises: InputError for options that do not fit each other or the model.
    """
    folder = Path(given.tokenizer or given.model).expanduser()
    if is_chat and folder.is_dir():
        find_template(folder, folder / "model")
    mesh = {axis: getattr(given, f"mesh.{axis}") for axis in ("data", "fsdp", "tensor")}
    settings = HarnessModel(
        path=given.model,
        tokenizer=given.tokenizer,
        router=given.router,
        skip_threshold=given.skip_threshold,
        execution_ratio=given.execution_ratio,
        static=given.static,
        num_random=given.random,
        dtype=given.dtype,
        mesh=MeshConfig(**{axis: n for axis, n in mesh.items() if n is not None}),
        seed=given.seed,
        cache=parse_cache(given.cache),
    )
    job = {"cache": settings.cache, "seed": settings.seed, "stop": given.stop}
    job |= sampling_settings(given)
    model, _, policy = load_harness_model(settings)
    return model, job | {"policy": policy, "tokenizer": tokenizer_path(settings, model)}


def sampling_settings(given: argparse.Namespace) -> dict[str, Any]:
    """The sampler, or what `text_sampler` is told."""
    settings = {name: getattr(given, name) for name in ("max_new_tokens", *SAMPLING)}
    settings = {name: value for name, value in settings.items() if value is not None}
    if given.sampler is None:
        return settings
    flags = " and ".join(f"--{name.replace('_', '-')}" for name in settings)
    require(not flags, f"--sampler has all of its settings; leave out {flags}")
    sampler = parse_choice(given.sampler, get_args(SamplerConfig), "--sampler")
    require(sampler is not None, f"--sampler={shown(given.sampler)} is none; name one")
    return {"sampler": sampler}
