"""The model, policy, cache and sampler that options name."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from dials_jax.bench import Bench, Case, prompt_length_of, random_prompts
from dials_jax.caching.parse import parse_cache
from dials_jax.cli.bench import parse_policy
from dials_jax.cli.options import SAMPLING
from dials_jax.config import MeshConfig, shown
from dials_jax.config.choices import parse_choice
from dials_jax.errors import require
from dials_jax.evaluation.harness import (
    HarnessModel,
    load_harness_model,
    load_policy,
    tokenizer_path,
)
from dials_jax.evaluation.task import SamplerConfig
from dials_jax.loading import find_model, load, read_config, read_formats
from dials_jax.models.model import Model
from dials_jax.nn.policy import Policy
from dials_jax.pods.programs import Answering
from dials_jax.sharding import make_mesh
from dials_jax.skipping.policies import Random, Static
from dials_jax.text import encode_prompts, find_template, open_reader
from dials_jax.text_sampler import check_lengths, fitting_length, text_sampler


def open_model(
    given: argparse.Namespace, is_chat: bool, prompts: Sequence[Any] = ()
) -> tuple[Model, dict[str, Any]]:
    """Loads the model; returns it with the arguments of `text_job` that the options stand for.

    Args:
      is_chat: a chat template is needed; without one nothing is loaded.
      prompts: nothing is loaded either if one of these cannot be answered.

    Raises: InputError for options that do not fit each other or the model.
    """
    folder = Path(given.tokenizer or given.model).expanduser()
    if is_chat and folder.is_dir():
        find_template(folder, folder / "model")
    settings = HarnessModel(
        path=given.model,
        tokenizer=given.tokenizer,
        router=given.router,
        skip_threshold=given.skip_threshold,
        execution_ratio=given.execution_ratio,
        static=given.static,
        num_random=given.random,
        dtype=given.dtype,
        weights=given.weights,
        batch_invariant=given.batch_invariant,
        mesh=mesh_of(given),
        seed=given.seed,
        cache=parse_cache(given.cache),
    )
    job = {"cache": settings.cache, "seed": settings.seed, "stop": given.stop}
    job |= sampling_settings(given)
    if prompts:
        reader = open_reader(read_config(given.model, given.dtype), tokenizer_path(settings))
        encode_prompts(reader, prompts, chat=given.chat, **sampling_settings(given))
    model, _, policy = load_harness_model(settings)
    return model, job | {"policy": policy, "tokenizer": tokenizer_path(settings)}


def answering_of(given: argparse.Namespace, prompts: Sequence[Any]) -> Answering:
    """The batch that the options stand for, of a model whose weights are not read.

    Args:
      prompts: none: they have as many tokens as random ones of `dials bench`.

    Raises: InputError for options that do not fit each other or the model.
    """
    cfg, settings = read_config(given.model, given.dtype), sampling_settings(given)
    if prompts:
        reader = open_reader(cfg, find_model(given.model)[0], given.tokenizer or None)
        ids, sampler, _ = encode_prompts(reader, prompts, chat=given.chat, **settings)
        lengths = list(map(len, ids))
    else:
        lengths, asked = [prompt_length_of(cfg)], settings.pop("max_new_tokens", None)
        length = fitting_length(cfg, lengths[0], asked, settings.get("block_length"))
        sampler = settings.get("sampler") or text_sampler(cfg, length, **settings)
    count = min(given.batch_size, len(prompts)) or given.batch_size
    dtype, weights = read_formats(given.model, given.dtype, given.weights)
    return Answering(
        cfg, sampler, count, max(lengths), min(lengths) < max(lengths), mesh_of(given),
        parse_cache(given.cache), _policy_of(given), given.router, weights, dtype,
    )  # fmt: skip


def _policy_of(given: argparse.Namespace) -> Policy | None:
    """Static or random layers; a router is read where its devices are known."""
    if given.static:
        return Static(given.static)
    return Random(given.random) if given.random else None


def open_bench(given: argparse.Namespace, texts: Sequence[Any]) -> Bench:
    """Loads the model, all policies and the prompts of `dials bench`.

    Args:
      texts: none: prompts are random tokens.

    Raises: InputError for options that do not fit each other or the model.
    """
    caches = [parse_cache(name) for name in given.caches]
    policies = {
        text: HarnessModel(
            path=given.model, tokenizer=given.tokenizer, seed=given.seed, **parse_policy(text)
        )
        for text in given.policies
    }
    model = load(
        given.model, given.dtype, make_mesh(mesh_of(given)), weights=given.weights,
        batch_invariant=given.batch_invariant,
    )  # fmt: skip
    settings = sampling_settings(given)
    if texts:
        reader = open_reader(model.config, model.path, given.tokenizer or None)
        prompts = [reader.tokenizer.encode(text) for text in reader.render(texts, given.chat)]
    else:
        prompts = random_prompts(model.config, given.num_prompts, given.prompt_length, given.seed)
    longest, asked = max(map(len, prompts)), settings.pop("max_new_tokens", None)
    length = fitting_length(model.config, longest, asked, settings.get("block_length"))
    sampler = settings.get("sampler") or text_sampler(model.config, length, **settings)
    check_lengths(model.config, prompts, sampler.gen_length, length)
    loaded = {text: load_policy(one, model) for text, one in policies.items()}
    cases = [Case(text, policy, cache) for text, policy in loaded.items() for cache in caches]
    return Bench(model, prompts, sampler, cases, given.batch_size, given.seed)


def mesh_of(given: argparse.Namespace) -> MeshConfig:
    """The mesh that the options name."""
    mesh = {axis: getattr(given, f"mesh.{axis}") for axis in ("data", "fsdp", "tensor")}
    return MeshConfig(**{axis: n for axis, n in mesh.items() if n is not None})


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
