"""How long the parts of `benchmarks.families` may take, and how equal its budgets are."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from benchmarks.families_claims import FAMILIES
from benchmarks.families_unit import Unit, chosen_families, units

PREPARE_SECONDS = 60.0  # to tokenise the text once, and to start
COMPILE_SECONDS = 200.0  # of a size, the first time on a machine: four trainings, and 15 programs
STORED_PER_SECOND = 0.25e9  # bytes, written or read
MEASURED = 1.5  # tokens that are scored or looked at, for one that is trained on
REPORT_SECONDS = 10.0  # of a sweep: its figures


def plan(options: argparse.Namespace) -> Iterator[str]:
    """What is to be done, how equal budgets are, and how long it may take."""
    total = 0.0
    for unit in units(options):
        tokens = unit.steps * unit.step_tokens
        yield f"{unit.name}: {tokens:,} tokens for each family ({unit.steps:,} steps)"
        yield (
            f"  continued: {unit.half * unit.step_tokens:,} as the causal model, the rest as a "
            "diffusion model with right shift"
        )
        native = unit.flops("native")
        shares = (f"{family} {unit.flops(family) / native:.3f}" for family in FAMILIES)
        yield f"  training FLOPs, native = 1: {', '.join(shares)} ({native:.3g} FLOPs)"
        parts = seconds(unit)
        total += sum(parts.values())
        yield "  seconds: " + ", ".join(f"{name} {s:.0f}" for name, s in parts.items())
    once = PREPARE_SECONDS + COMPILE_SECONDS * len(set(options.sizes))
    yield f"in all {(total + once) / 60:.1f} minutes, {once:.0f} s of them to prepare and compile"


def seconds(unit: Unit) -> dict[str, float]:
    """How long its parts may take."""
    options, measured, families = unit.options, MEASURED * unit.rate, chosen_families(unit.options)
    kept = sum(len(unit.trainings[family].keep_models_at) + 1 for family in families)
    # A checkpoint is of four sizes of the model; every kept model is written, and read twice.
    stored = (4 * len(families) + 3 * kept) * unit.model_bytes
    models = sum(len(unit.models(family)) for family in families)
    looked_at = models * options.prompts * options.length * options.study_steps
    policies = unit.layers + 2 * unit.most_skipped + 1
    scored = policies * options.items * options.length  # a causal model's are exact
    scored *= sum(1 if family == "causal" else options.samples for family in families)
    # A native training runs at `rate`; others by their FLOPs.
    trained = sum(map(unit.own_flops, families)) / unit.own_flops("native") * unit.steps
    routed = options.router_steps * unit.step_tokens / unit.rate
    return {
        "training": trained * unit.step_tokens / unit.rate,
        "storing": stored / STORED_PER_SECOND,
        "routers": routed if "native" in families else 0.0,
        "profiles": looked_at / measured,
        "losses": scored / measured + REPORT_SECONDS * len(families),
    }
