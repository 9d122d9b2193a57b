"""Times whole generations: `python -m benchmarks.decode --help`.

Weights are random, of the true shape, and made on the device. Compilation is timed separately. The
figures do not depend on the weights' values if every step reveals a fixed number of tokens; with
`--threshold` and the other rules they do.

`compile_s` is short for a program that is already in JAX's compilation cache;
JAX_ENABLE_COMPILATION_CACHE=false compiles all programs.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.command import (
    add_cases,
    add_generation,
    add_layers,
    add_layout,
    add_model,
    add_out,
    add_profile,
    make_main,
)
from benchmarks.profile import profile_calls
from benchmarks.random_model import make_config, make_model, make_routers
from benchmarks.report import LiveTable, peak_gigabytes
from dials_jax.caching.parse import parse_cache
from dials_jax.errors import nearest, require
from dials_jax.evaluation.timing import time_in_turns
from dials_jax.models.model import Model
from dials_jax.nn.policy import Policy
from dials_jax.sampling.confidence import Confidence
from dials_jax.sampling.generate import generate
from dials_jax.skipping.policies import Random, Static
from dials_jax.skipping.routed import Routed

RULES = {  # of `Confidence`, beside its quota
    "threshold": "reveal all tokens of this confidence",
    "factor": "reveal tokens by Fast-dLLM's factor",
    "entropy_threshold": "reveal all tokens of at most this entropy (nats)",
    "entropy_bound": "reveal tokens whose entropies sum to this (nats)",
    "edit_threshold": "replace revealed tokens by others of more than this probability",
}

COLUMNS = {
    "cache": "<12", "policy": "<12", "batch": ">5d", "nfe": ">5d", "ms_a_call": ">9.2f",
    "tokens_a_second": ">15.1f", "layers_run": ">10.3f", "flops_share": ">11.3f",
    "seconds": ">8.2f", "compile_s": ">9.1f", "peak_gb": ">7.1f",
}  # fmt: skip


def parse_policy(text: str, num_layers: int, make_routed: Callable[[int], Policy]) -> Policy | None:
    """Parses `full`, `static-N`, `random-N` or `routed-N`, where N is the number of skipped layers.

    Args:
      make_routed: makes routers that skip the given number of layers.
    """
    name, _, number = text.partition("-")
    if text == "full":
        return None
    makers = {
        Static.name: lambda n: Static(range(num_layers - n, num_layers)),
        Random.name: Random,
        Routed.name: make_routed,
    }
    require(name in makers, f"policy {text!r} is not known{nearest(name, ['full', *makers])}")
    require(number.isdigit(), f"policy {text!r}: give the number of layers, as in {name}-4")
    require(
        int(number) <= num_layers,
        f"policy {text!r} skips more layers than the {num_layers} there are",
    )
    return makers[name](int(number))


def make_sampler(options: argparse.Namespace) -> Confidence:
    return Confidence(
        gen_length=options.gen,
        block_length=options.block,
        steps=options.steps or options.gen,
        **{name: getattr(options, name) for name in RULES},
    )


def make_padding(options: argparse.Namespace) -> np.ndarray | None:
    """Where prompts are valid: no padding in the first sequence, half the prompt in the last."""
    if not options.padded:
        return None
    first = np.linspace(0, options.prompt // 2, options.batch).astype(int)
    return np.arange(options.prompt) >= first[:, None]


def run_case(model: Model, options: argparse.Namespace, cache: str, policy: str) -> dict[str, Any]:
    """Times one combination of cache and policy; returns a row of the table."""
    cfg = model.config
    prompts = np.random.default_rng(0).integers(
        2, min(1000, cfg.vocab_size // 2), (options.batch, options.prompt)
    )
    settings = {
        "valid": make_padding(options), "sampler": make_sampler(options),
        "cache": parse_cache(cache),
        "policy": parse_policy(policy, model.num_layers, partial(make_routers, model)),
    }  # fmt: skip
    [times] = time_in_turns([lambda: [generate(model, prompts, **settings)]], options.repeats)
    [out], seconds = times.outs, times.median
    if options.profile:
        folder = Path(options.profile) / f"{cache}_{policy}"
        profile_calls(folder, lambda: generate(model, prompts, **settings).nfe)
    return {
        "cache": cache, "policy": policy, "batch": options.batch, "nfe": out.nfe,
        "ms_a_call": 1e3 * seconds / out.nfe,
        "tokens_a_second": options.batch * options.gen / seconds,
        "layers_run": out.flops.layers_run, "flops_share": out.flops.flops_share,
        "seconds": seconds, "all_seconds": times.seconds or [seconds],
        "compile_s": times.compile_seconds, "peak_gb": peak_gigabytes(),
        "model": dataclasses.asdict(cfg),
    }  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_layers(parser)
    add_generation(parser)
    parser.add_argument("--steps", type=int, help="denoising steps; default: one per token")
    for name, what in RULES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, help=what)
    parser.add_argument(
        "--padded", action="store_true", help="prompts of several lengths, the shortest of half"
    )
    add_cases(parser, caches=("none", "dual", "es-64-4", "es-64-16"))
    add_layout(parser)
    parser.add_argument(
        "--batch-invariant", action="store_true", help="as `load(..., batch_invariant=True)`"
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=3,
        help="timed generations after a first one; the median counts; 0 times the first",
    )
    add_profile(parser)
    add_out(parser)


def check_cases(options: argparse.Namespace, num_layers: int) -> None:
    """Raises: InputError for a cache or a policy that is not known, before any case runs."""
    for cache in options.caches:
        parse_cache(cache)
    for policy in options.policies:
        parse_policy(policy, num_layers, lambda num_skipped: None)


def run(options: argparse.Namespace) -> None:
    cfg = make_config(options.model, options.layers)
    make_sampler(options)  # refuses wrong settings
    check_cases(options, cfg.num_layers)
    table = LiveTable(COLUMNS, options.out, vars(options))
    model = make_model(
        cfg, options.layout, weights=options.weights, batch_invariant=options.batch_invariant
    )
    for cache in options.caches:
        for policy in options.policies:
            table.add_row(**run_case(model, options, cache, policy))


main = make_main("decode", __doc__, add_options, run)

if __name__ == "__main__":
    sys.exit(main())
