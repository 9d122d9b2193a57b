"""Whole generations, timed: `python -m benchmarks.decode --help`.

Weights are random, of the true shape and made on the device. Compilation is timed separately. The
figures do not depend on the weights' values if every step reveals a fixed number of tokens; with
`--threshold` they do.

`compile_s` is short for a program that is in JAX's compilation cache already;
JAX_ENABLE_COMPILATION_CACHE=false compiles all of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.profile import print_profile
from benchmarks.random_model import MODELS, make_config, make_model, make_routers
from benchmarks.report import Table, exit_status, peak_gigabytes
from dials_jax.caching.parse import parse_cache
from dials_jax.compiling import total_compile_seconds
from dials_jax.config import ModelConfig
from dials_jax.errors import nearest, require
from dials_jax.models.model import Model
from dials_jax.nn.policy import Policy
from dials_jax.sampling.confidence import Confidence
from dials_jax.sampling.generate import generate
from dials_jax.skipping.policies import Random, Static
from dials_jax.skipping.routed import Routed

COLUMNS = {
    "cache": "<12", "policy": "<12", "batch": ">5d", "nfe": ">5d", "ms_a_call": ">9.2f",
    "tokens_a_second": ">15.1f", "layers_run": ">10.3f", "flops_share": ">11.3f",
    "seconds": ">8.2f", "compile_s": ">9.1f", "peak_gb": ">7.1f",
}  # fmt: skip


def parse_policy(text: str, num_layers: int, routed: Callable[[int], Policy]) -> Policy | None:
    """`full`, or `static-N`, `random-N` or `routed-N`, where N is the number of layers skipped.

    Args:
      routed: makes routers that skip this many layers.
    """
    name, _, number = text.partition("-")
    if text == "full":
        return None
    makers = {
        Static.name: lambda n: Static(range(num_layers - n, num_layers)),
        Random.name: Random,
        Routed.name: routed,
    }
    require(name in makers, f"policy {text!r} is not known{nearest(name, ['full', *makers])}")
    require(number.isdigit(), f"policy {text!r}: give the number of layers, as in {name}-4")
    require(
        int(number) <= num_layers,
        f"policy {text!r} skips more layers than the {num_layers} there are",
    )
    return makers[name](int(number))


def sampler_of(options: argparse.Namespace) -> Confidence:
    return Confidence(
        gen_length=options.gen,
        block_length=options.block,
        steps=options.steps or options.gen,
        threshold=options.threshold,
    )


def padding_of(options: argparse.Namespace) -> np.ndarray | None:
    """False at the first tokens of each prompt: none in the first sequence, half in the last."""
    if not options.padded:
        return None
    first = np.linspace(0, options.prompt // 2, options.batch).astype(int)
    return np.arange(options.prompt) >= first[:, None]


def run_case(model: Model, options: argparse.Namespace, cache: str, policy: str) -> dict[str, Any]:
    cfg = model.config
    prompts = np.random.default_rng(0).integers(
        2, min(1000, cfg.vocab_size // 2), (options.batch, options.prompt)
    )
    settings = {
        "valid": padding_of(options), "sampler": sampler_of(options), "cache": parse_cache(cache),
        "policy": parse_policy(policy, model.num_layers, partial(make_routers, model)),
    }  # fmt: skip
    before = total_compile_seconds()
    first = generate(model, prompts, **settings)
    compiled = total_compile_seconds() - before
    runs = [generate(model, prompts, **settings) for _ in range(options.repeats)] or [first]
    best = sorted(runs, key=lambda r: r.flops.seconds)[len(runs) // 2]
    if options.profile:
        folder = Path(options.profile) / f"{cache}_{policy}"
        with jax.profiler.trace(str(folder)):
            generate(model, prompts, **settings)
        print_profile(folder, best.nfe)
    return {
        "cache": cache, "policy": policy, "batch": options.batch, "nfe": best.nfe,
        "ms_a_call": 1e3 * best.flops.seconds / best.nfe,
        "tokens_a_second": options.batch * options.gen / best.flops.seconds,
        "layers_run": best.flops.layers_run, "flops_share": best.flops.flops_share,
        "seconds": best.flops.seconds, "all_seconds": [r.flops.seconds for r in runs],
        "compile_s": compiled, "peak_gb": peak_gigabytes(),
        "model": dataclasses.asdict(cfg),
    }  # fmt: skip


def add_shapes(parser: argparse.ArgumentParser) -> None:
    """Options that say how large the model, its batch and its canvas are."""
    parser.add_argument("--model", default="llada_8b", help=f"one of {', '.join(MODELS)}")
    parser.add_argument("--layers", type=int, help="number of layers; default: all")
    parser.add_argument("--batch", type=int, default=8, help="sequences")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--gen", type=int, default=512, help="tokens to generate")
    parser.add_argument("--block", type=int, default=64, help="tokens of a block")


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__)
    add_shapes(parser)
    parser.add_argument("--steps", type=int, help="denoising steps; default: one per token")
    parser.add_argument("--threshold", type=float, help="reveal all tokens of this confidence")
    parser.add_argument(
        "--padded", action="store_true", help="prompts of several lengths, the shortest of half"
    )
    parser.add_argument("--caches", nargs="+", default=["none", "dual", "es-64-4", "es-64-16"])
    parser.add_argument("--policies", nargs="+", default=["full"])
    parser.add_argument(
        "--layout", default="auto", choices=["auto", "stacked", "unrolled", "fused"]
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=3,
        help="timed generations after a first one; the median counts; 0 times the first",
    )
    parser.add_argument("--profile", metavar="DIR", help="trace one generation per case to DIR")
    parser.add_argument("--out", metavar="FILE", help="write the figures as JSON")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    cfg: ModelConfig = make_config(options.model, options.layers)
    sampler_of(options)  # a wrong case is refused before the first one runs
    for cache in options.caches:
        parse_cache(cache)
    for text in options.policies:
        parse_policy(text, cfg.num_layers, lambda _: None)
    table = Table(COLUMNS, options.out, vars(options))
    model = make_model(cfg, options.layout)
    for cache in options.caches:
        for policy in options.policies:
            table.add(**run_case(model, options, cache, policy))


def main(arguments: list[str] | None = None) -> int:
    options = options_of(arguments)
    return exit_status(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
