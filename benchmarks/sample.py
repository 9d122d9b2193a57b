"""Times ancestral sampling and model schedules: `python -m benchmarks.sample --help`.

Weights are random, of the true shape, and made on the device. The figures do not depend on their
values: which tokens a step reveals is drawn without the model. Every depth is timed alone; with
`--light-fractions`, the shallowest then takes these shares of the deepest one's steps, at both ends
(Sedykh, Table 2). `saved_time` and `saved_flops` compare with the deepest model alone,
`saved_blocks` is the paper's p (B_H - B_L) / B_H.

A step costs a model call only if it reveals a token. Within a call, sequences may be at different
steps, so there are fewer calls than steps. Cases are timed in turns, and the median counts.
Compilation is timed separately; JAX_ENABLE_COMPILATION_CACHE=false compiles all programs again.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.command import add_layout, add_model, add_out, add_profile, make_main
from benchmarks.profile import profile_calls
from benchmarks.random_model import make_config, make_model
from benchmarks.report import LiveTable, peak_gigabytes, run_and_count_compilation
from dials_jax.errors import require
from dials_jax.keys import seed_key
from dials_jax.models.model import Model
from dials_jax.sampling.ancestral import Ancestral
from dials_jax.sampling.generate import generate
from dials_jax.sampling.generation import Generation
from dials_jax.sampling.model_schedule import Schedule

COLUMNS = {
    "case": "<24", "nfe": ">6d", "ms_a_step": ">9.3f", "ms_a_call": ">9.3f", "seconds": ">8.3f",
    "saved_blocks": ">12.3f", "saved_flops": ">11.3f", "saved_time": ">10.3f",
    "time_of_flops": ">13.3f", "compile_s": ">9.1f", "peak_gb": ">7.1f",
}  # fmt: skip


def make_cases(models: dict[int, Model], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The arguments of `generate`, by name of the case: every depth alone, then the schedules."""
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
    """Runs all cases in turns: their generations, and the seconds that their programs compiled."""
    settings = {
        "sampler": Ancestral(
            options.length, options.steps, options.precision, options.first_hitting
        ),
        "num_sequences": options.batch, "key": seed_key(0),
    }  # fmt: skip
    out = {}
    for name, case in cases.items():
        first, compile_seconds = run_and_count_compilation(generate, **case, **settings)
        out[name] = [] if options.repeats else [first], compile_seconds
    for _ in range(options.repeats):
        for name, case in cases.items():
            out[name][0].append(generate(**case, **settings))
    if options.profile:
        for name, case in cases.items():
            print(name)
            folder = Path(options.profile) / name.replace(" ", "_")
            profile_calls(folder, lambda case=case: generate(**case, **settings).nfe)
    return out


def add_rows(
    table: LiveTable, results: dict[str, tuple[list[Generation], float]], depth: int, steps: int
) -> None:
    """Fills the table; `depth` is that of the deepest model, with which the others are compared."""
    deepest = f"{depth} blocks"

    def seconds(name):
        return float(np.median([run.flops.seconds for run in results[name][0]]))

    whole = results[deepest][0][0].flops.model_total
    for name, (runs, compiled) in results.items():
        flops, nfe, gates = runs[0].flops, runs[0].nfe, runs[0].gates
        saved_time = 1 - seconds(name) / seconds(deepest)
        saved_flops = 1 - flops.model_total / whole
        table.add_row(
            case=name, nfe=nfe, seconds=seconds(name), ms_a_step=1e3 * seconds(name) / steps,
            ms_a_call=1e3 * seconds(name) / nfe,
            saved_blocks=1 - float(gates.sum() / (gates[:, 0].size * depth)),
            saved_flops=saved_flops, saved_time=saved_time,
            time_of_flops=saved_time / saved_flops if saved_flops > 0 else None,
            compile_s=compiled, peak_gb=peak_gigabytes(),
            all_seconds=[run.flops.seconds for run in runs],
        )  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model(parser, default="mdlm")
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
    add_layout(parser)
    parser.add_argument(
        "--repeats", type=int, default=3, help="timed after a first one; 0 times the first"
    )
    add_profile(parser)
    add_out(parser)


def run(options: argparse.Namespace) -> None:
    require(
        not options.light_fractions or len(set(options.blocks)) > 1,
        "--light-fractions needs two depths; give them, as in --blocks 12 4",
    )
    configs = {depth: make_config(options.model, depth) for depth in options.blocks}
    settings = vars(options) | {"config": dataclasses.asdict(configs[max(configs)])}
    table = LiveTable(COLUMNS, options.out, settings)
    models = {
        depth: make_model(cfg, options.layout, weights=options.weights)
        for depth, cfg in configs.items()
    }
    results = run_in_turns(make_cases(models, options), options)
    add_rows(table, results, max(models), options.steps)


main = make_main("sample", __doc__, add_options, run)

if __name__ == "__main__":
    sys.exit(main())
