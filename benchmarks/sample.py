"""Ancestral sampling and model schedules, timed: `python -m benchmarks.sample --help`.

Weights are random, of the true shape and made on the device. The figures do not depend on their
values: which tokens a step reveals is drawn without the model. Every depth is timed alone; with
`--light-fractions`, the shallowest then takes these shares of the deepest one's steps, at both ends
(Sedykh et al., table 2). `saved_time` and `saved_flops` compare with the deepest model alone,
`saved_blocks` is the paper's p (B_H - B_L) / B_H.

A step costs a model call only where it reveals a token. In one call, sequences may be at different
steps, so that there are fewer calls than steps. Cases are timed in turns, and the median counts.
Compilation is timed separately; JAX_ENABLE_COMPILATION_CACHE=false compiles all programs again.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.profile import print_profile
from benchmarks.random_model import MODELS, make_config, make_model
from benchmarks.report import Table, exit_status, peak_gigabytes
from dials_jax.compiling import total_compile_seconds
from dials_jax.errors import require
from dials_jax.keys import seed_key
from dials_jax.models.model import Model
from dials_jax.sampling.ancestral import Ancestral
from dials_jax.sampling.generate import Generation, generate
from dials_jax.sampling.model_schedule import Schedule

COLUMNS = {
    "case": "<24", "nfe": ">6d", "ms_a_step": ">9.3f", "ms_a_call": ">9.3f", "seconds": ">8.3f",
    "saved_blocks": ">12.3f", "saved_flops": ">11.3f", "saved_time": ">10.3f",
    "time_of_flops": ">13.3f", "compile_s": ">9.1f", "peak_gb": ">7.1f",
}  # fmt: skip


def cases_of(models: dict[int, Model], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Settings of `generate` by name: every depth alone, then the sweep."""
    cases = {f"{depth} blocks": {"model": model} for depth, model in models.items()}
    heavy, light = max(models), min(models)
    for fraction in options.light_fractions:
        schedule = Schedule.sandwich(options.steps, fraction)
        pair = {"H": models[heavy], "L": models[light]}
        cases[str(schedule)] = {"model": pair, "schedule": schedule}
    return cases


def run_in_turns(
    cases: dict[str, dict[str, Any]], options: argparse.Namespace
) -> dict[str, tuple[list[Generation], float]]:
    """All generations of every case, and the seconds that its programs took to compile."""
    settings = {
        "sampler": Ancestral(
            options.length, options.steps, options.precision, options.first_hitting
        ),
        "num_sequences": options.batch, "key": seed_key(0),
    }  # fmt: skip
    out = {}
    for name, case in cases.items():
        before = total_compile_seconds()
        first = generate(**case, **settings)
        out[name] = [] if options.repeats else [first], total_compile_seconds() - before
    for _ in range(options.repeats):
        for name, case in cases.items():
            out[name][0].append(generate(**case, **settings))
    if options.profile:
        for name, case in cases.items():
            folder = Path(options.profile) / name.replace(" ", "_")
            with jax.profiler.trace(str(folder)):
                nfe = generate(**case, **settings).nfe
            print(name)
            print_profile(folder, nfe)
    return out


def report(
    table: Table, results: dict[str, tuple[list[Generation], float]], depth: int, steps: int
) -> None:
    """Rows of the table; `depth` is that of the deepest model, to which the others are compared."""
    deepest = f"{depth} blocks"

    def seconds(name):
        return float(np.median([run.flops.seconds for run in results[name][0]]))

    whole = results[deepest][0][0].flops.model_total
    for name, (runs, compiled) in results.items():
        flops, nfe, gates = runs[0].flops, runs[0].nfe, runs[0].gates
        saved_time = 1 - seconds(name) / seconds(deepest)
        saved_flops = 1 - flops.model_total / whole
        table.add(
            case=name, nfe=nfe, seconds=seconds(name), ms_a_step=1e3 * seconds(name) / steps,
            ms_a_call=1e3 * seconds(name) / nfe,
            saved_blocks=1 - float(gates.sum() / (gates[:, 0].size * depth)),
            saved_flops=saved_flops, saved_time=saved_time,
            time_of_flops=saved_time / saved_flops if saved_flops > 0 else None,
            compile_s=compiled, peak_gb=peak_gigabytes(),
            all_seconds=[run.flops.seconds for run in runs],
        )  # fmt: skip


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sample", description=__doc__)
    parser.add_argument("--model", default="mdlm", help=f"one of {', '.join(MODELS)}")
    parser.add_argument("--blocks", type=int, nargs="+", default=[12, 4], help="depths")
    parser.add_argument("--batch", type=int, default=16, help="sequences")
    parser.add_argument("--length", type=int, default=1024, help="tokens per sequence")
    parser.add_argument("--steps", type=int, default=1000, help="denoising steps")
    parser.add_argument("--precision", default="exact", choices=["exact", "float32"])
    parser.add_argument(
        "--first-hitting", action="store_true", help="one token per sequence and call"
    )
    parser.add_argument(
        "--light-fractions", type=float, nargs="+", default=[], help="as in 0 .25 .5 .75 1"
    )
    parser.add_argument(
        "--layout", default="auto", choices=["auto", "stacked", "unrolled", "fused"]
    )
    parser.add_argument(
        "--repeats", type=int, default=3, help="timed after a first one; 0 times the first"
    )
    parser.add_argument("--profile", metavar="DIR", help="trace one generation per case to DIR")
    parser.add_argument("--out", metavar="FILE", help="write the figures as JSON")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    require(
        not options.light_fractions or len(set(options.blocks)) > 1,
        "--light-fractions needs two depths; give them, as in --blocks 12 4",
    )
    configs = {depth: make_config(options.model, depth) for depth in options.blocks}
    settings = vars(options) | {"config": dataclasses.asdict(configs[max(configs)])}
    table = Table(COLUMNS, options.out, settings)
    models = {depth: make_model(cfg, options.layout) for depth, cfg in configs.items()}
    results = run_in_turns(cases_of(models, options), options)
    report(table, results, max(models), options.steps)


def main(arguments: list[str] | None = None) -> int:
    options = options_of(arguments)
    return exit_status(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
