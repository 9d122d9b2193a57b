"""Times work on 1, 2, 4, ... devices of one machine: `python -m benchmarks.scaling --help`.

    python -m benchmarks.scaling --out scaling.json --plot scaling.png
    python -m benchmarks.scaling --works pretraining routers --counts 1 2

All devices' counts and meshes of a work run in turns. `efficiency` is the tokens per second on N
devices divided by N times those on one device, the median over the turns. `data` and `fsdp` give
every device as many sequences as one device has (but in `pretraining-512`, whose batch is the
published one); `tensor` shares the sequences of one device.

`collectives` is the share of a device's time in which a collective runs, which may wait for another
device; `exposed` is the part of it in which nothing else runs. Both are of one traced run, the mean
over devices, and missing where the backend's trace holds no kernels.

Weights and tokens are random. On a machine without accelerators,
XLA_FLAGS=--xla_force_host_platform_device_count=8 makes devices to try it with `--model tiny`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from benchmarks.command import add_generation, add_layers, add_model, make_main
from benchmarks.decode import parse_policy
from benchmarks.profile import collective_shares, read_events_of_devices
from benchmarks.random_model import make_config, make_model, make_routers
from benchmarks.report import LiveTable
from benchmarks.train import FAMILIES, ROUTERS, StepSettings, TimedStep
from dials_jax import sharding
from dials_jax.caching.parse import parse_cache
from dials_jax.compiling import forget_programs, program_bytes, programs_used
from dials_jax.config import MeshConfig
from dials_jax.errors import nearest, require
from dials_jax.evaluation.batched import log_likelihoods
from dials_jax.evaluation.timing import turns
from dials_jax.reporting.figure import GREY, figure_at
from dials_jax.sampling.confidence import Confidence
from dials_jax.sampling.generate import generate

COLUMNS = {
    "work": "<15", "mesh": "<19", "devices": ">7d", "sequences": ">9d", "ms": ">9.2f",
    "tokens_a_second": ">15,.0f", "speedup": ">7.3f", "efficiency": ">10.3f",
    "collectives": ">11.1%", "exposed": ">7.1%", "program_gb": ">10.1f", "setup_s": ">7.0f",
}  # fmt: skip
PUBLISHED_BATCH = 512  # of MDLM (Sahoo et al., 2024), in sequences of 1,024 tokens


@dataclass
class Case:
    """A work on some devices, ready to run.

    Attributes:
      run: runs it once, and returns its seconds.
      sequences: of one run, or of one step.
      tokens: that one run counts.
      program: bytes on a device of its largest program.
    """

    run: Callable[[], float]
    sequences: int
    tokens: int
    program: int


MakeCase = Callable[[Mesh, argparse.Namespace], Case]


@dataclass(frozen=True)
class Work:
    """Something to spread over devices, in one or several ways.

    Attributes:
      spreads: the axes of the mesh of each way; several axes have equal sizes.
    """

    make: MakeCase
    spreads: Sequence[tuple[str, ...]]

    def meshes(self, counts: Sequence[int]) -> Iterator[tuple[str, Mesh]]:
        """The meshes of these numbers of devices by name; those that are not possible are left."""
        if 1 in counts:
            yield "one device", sharding.make_mesh(MeshConfig(), jax.devices()[:1])
        for axes in self.spreads:
            for count in counts:
                size = round(count ** (1 / len(axes)))
                if size > 1 and size ** len(axes) == count:
                    sizes = {"data": 1, **dict.fromkeys(axes, size)}
                    mesh = sharding.make_mesh(MeshConfig(**sizes), jax.devices()[:count])
                    yield " x ".join(f"{axis} {size}" for axis in axes), mesh


# --------------------------------------------------------------------------------------- training


def train_case(cfg: Any, step: StepSettings, mesh: Mesh, options: argparse.Namespace) -> Case:
    timed = TimedStep(cfg, step, mesh)
    timed.seconds(3)
    tokens = step.batch * step.length
    size = program_bytes(timed.program)
    return Case(lambda: timed.seconds(options.steps), step.batch, tokens, size)


def pretraining(mesh: Mesh, options: argparse.Namespace, batch: int | None = None) -> Case:
    """A step of MDLM, of a fixed batch or of as many sequences on every device."""
    shards, own = sharding.num_batch_shards(mesh), options.train_batch
    model = "tiny" if options.model == "tiny" else "mdlm"
    total = batch or own * shards
    step = StepSettings(
        batch=total, length=options.length, unrolled=True, microbatches=total // (own * shards)
    )
    return train_case(FAMILIES[model](options.blocks), step, mesh, options)


def router_training(mesh: Mesh, options: argparse.Namespace) -> Case:
    """A step of DIALS' routers on the frozen model."""
    batch = options.router_batch * sharding.num_batch_shards(mesh)
    step = StepSettings(
        objective=ROUTERS, batch=batch, length=options.length, unrolled=True,
        microbatches=options.router_microbatches,
    )  # fmt: skip
    return train_case(make_config(options.model, options.layers), step, mesh, options)


# ------------------------------------------------------------------------------------- inference


def generation(cache: str, policy: str, mesh: Mesh, options: argparse.Namespace) -> Case:
    """Generates for --batch sequences per batch shard."""
    cfg = make_config(options.model, options.layers)
    model = make_model(cfg, mesh=mesh)
    batch = options.batch * sharding.num_batch_shards(mesh)
    rng = np.random.default_rng(0)
    prompts = rng.integers(2, min(1000, cfg.vocab_size // 2), (batch, options.prompt))
    settings = {
        "sampler": Confidence(options.gen, options.block, options.gen),
        "cache": parse_cache(cache),
        "policy": parse_policy(policy, cfg.num_layers, partial(make_routers, model)),
    }

    def run() -> float:
        return generate(model, prompts, **settings).flops.seconds

    return Case(run, batch, batch * options.gen, _largest_program(run))


def likelihood(mesh: Mesh, options: argparse.Namespace) -> Case:
    """Scores masked copies of answers, padding and host included."""
    cfg = make_config(options.model, options.layers)
    model, rng = make_model(cfg, mesh=mesh), np.random.default_rng(0)
    batch = options.batch * sharding.num_batch_shards(mesh)
    length = options.prompt + options.block
    ids = rng.integers(10, min(400, cfg.vocab_size // 2), (batch, length)).tolist()
    pairs = [(each[: options.prompt], each[options.prompt :]) for each in ids]

    def run() -> float:
        start = time.perf_counter()
        log_likelihoods(model, pairs, num_samples=options.samples, batch_size=batch)
        return time.perf_counter() - start

    return Case(run, batch, batch * options.samples * length, _largest_program(run))


def _largest_program(run: Callable[[], Any]) -> int:
    with programs_used() as programs:
        run()
    return max(map(program_bytes, programs))


def make_works(num_skipped: int) -> dict[str, Work]:
    """All works by name. `gates-random` and `gates-routed` have gates per sequence.

    Args:
      num_skipped: layers that these leave out.
    """
    data, fsdp, tensor = ("data",), ("fsdp",), ("tensor",)
    found = {
        "pretraining": Work(pretraining, [data]),
        "pretraining-512": Work(partial(pretraining, batch=PUBLISHED_BATCH), [data]),
        "routers": Work(router_training, [fsdp]),
        "likelihood": Work(likelihood, [data]),
    }
    for cache in ("none", "dual"):
        make = partial(generation, cache, "full")
        found[cache] = Work(make, [data, tensor, ("data", "tensor")])
    for policy in ("random", "routed"):
        make = partial(generation, "none", f"{policy}-{num_skipped}")
        found[f"gates-{policy}"] = Work(make, [data])
    return found


# ---------------------------------------------------------------------------------------- table


def measure(work: Work, counts: Sequence[int], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Times a work on all its meshes, in turns; a row for each."""
    cases, rows = [], []
    for name, mesh in work.meshes(counts):
        start = time.perf_counter()
        case = work.make(mesh, options)
        cases.append(case)
        rows.append(
            {"mesh": name, "devices": mesh.size, "sequences": case.sequences,
             "program_gb": case.program / 1e9, "setup_s": time.perf_counter() - start}
        )  # fmt: skip
    seconds: list[list[float]] = [[] for _ in cases]
    for _, number in turns(options.repeats, len(cases)):
        seconds[number].append(cases[number].run())
    rates = [case.tokens / np.array(own) for case, own in zip(cases, seconds, strict=True)]
    for case, row, own, rate in zip(cases, rows, seconds, rates, strict=True):
        gains = rate / rates[0]
        row |= {
            "ms": 1e3 * float(np.median(own)), "tokens_a_second": float(np.median(rate)),
            "speedup": float(np.median(gains)), "speedups": gains.tolist(),
            "efficiency": float(np.median(gains)) / row["devices"] * rows[0]["devices"],
            "all_seconds": own,
        } | traced_shares(case)  # fmt: skip
    return rows


def traced_shares(case: Case) -> dict[str, float]:
    """The shares of collectives in one run, the mean over devices."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            case.run()
        found = [collective_shares(events) for events in read_events_of_devices(Path(folder))]
    shares = [each for each in found if each]
    if not shares:
        return {}
    running, alone = np.mean(shares, axis=0)
    return {"collectives": float(running), "exposed": float(alone)}


def plot(rows: Sequence[dict[str, Any]], path: str) -> None:
    """Draws the gain in tokens per second against the number of devices."""
    counts = sorted({row["devices"] for row in rows})
    with figure_at(Path(path), 6.5, 4.5) as figure:
        axes = figure.subplots()
        axes.plot(counts, counts, color=GREY, linestyle=":", label="perfect")
        for label, own in _curves(rows).items():
            axes.plot([r["devices"] for r in own], [r["speedup"] for r in own], "o-", label=label)
        axes.set(xlabel="devices", ylabel="tokens/s, against one device", xticks=counts)
        axes.legend(fontsize="small")


def _curves(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each work and way to spread it, from one device on."""
    curves: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["devices"] == 1:
            continue
        way = "".join(c for c in row["mesh"] if not c.isdigit()).strip()
        label = f"{row['work']}, {' '.join(way.split())}"
        first = [each for each in rows if each["work"] == row["work"] and each["devices"] == 1]
        curves.setdefault(label, first).append(row)
    return curves


def run(options: argparse.Namespace) -> int:
    layers, total = make_config(options.model, options.layers).num_layers, jax.device_count()
    works = make_works(layers // 4)
    for name in options.works:
        require(name in works, f"work {name!r} is not known{nearest(name, works)}")
    counts = options.counts or [n for n in (1 << i for i in range(12)) if n <= total]
    for count in counts:
        require(0 < count <= total, f"--counts {count}: this machine has {total} device(s)")
    require(min(options.steps, options.repeats) > 0, "--steps and --repeats must be positive")
    table, rows, failures = LiveTable(COLUMNS, options.out, vars(options)), [], 0
    for name in options.works:
        try:
            found = measure(works[name], sorted(set(counts)), options)
        except jax.errors.JaxRuntimeError as error:  # such as memory: the others go on
            print(f"{name} fails: {' '.join(str(error).split())[:300]}", flush=True)
            failures += 1
            continue
        finally:
            forget_programs()
        for row in found:
            rows.append({"work": name} | row)
            table.add_row(**rows[-1])
    if options.plot and rows:
        plot(rows, options.plot)
    return failures


def add_options(parser: argparse.ArgumentParser) -> None:
    works = list(make_works(0))
    parser.add_argument("--works", nargs="+", default=works, help=f"default: {' '.join(works)}")
    parser.add_argument("--counts", type=int, nargs="+", help="default: 1 2 4 ... up to all")
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    add_model(parser)
    add_layers(parser)
    add_generation(parser, gen=64, block=32)
    parser.add_argument("--samples", type=int, default=64, help="masked copies of an answer")
    training = parser.add_argument_group("training")
    training.add_argument("--blocks", type=int, default=12, help="of MDLM")
    training.add_argument("--length", type=int, default=1024, help="tokens per sequence")
    training.add_argument("--steps", type=int, default=5, help="of one timing")
    training.add_argument("--train-batch", type=int, default=32, help="MDLM's, per device")
    training.add_argument("--router-batch", type=int, default=16, help="per device")
    training.add_argument("--router-microbatches", type=int, default=4)
    parser.add_argument("--out", metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--plot", metavar="FILE", help="draw the gains (PNG or PDF)")


main = make_main("scaling", __doc__, add_options, run)

if __name__ == "__main__":
    sys.exit(main())
