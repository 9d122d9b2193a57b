"""What changes with the batch: `python -m benchmarks.invariance --help`.

The same sequences, each with its own key, are computed in batches of several sizes, in the opposite
order and with more padding, and compared bit by bit with one batch of all of them: tokens and their
log-probabilities after a generation, the logits and every layer's output of one forward pass (at
which layer does the first bit differ?), and likelihoods. With --data N also on N devices, against
one. Weights are random, of the true shape, unless --model is a folder. Near ties are common among
random weights' predictions, so trained models differ less.

    python -m benchmarks.invariance --layers 8 --modes off on --out invariance.json
    python -m benchmarks.invariance --quick --parts kernels speed table     (`kernels`: on a GPU)
    python -m benchmarks.invariance --layers 8 --parts neighbours --modes off
    python -m benchmarks.invariance --parts answers --model runs/demo/model --dtype bfloat16 \\
        --router runs/demo/router-high --modes off --sizes 1 8 32 100
    python -m benchmarks.invariance --parts answers --model runs/text/model --modes off \\
        --text data/text/validation.jsonl.xz --prompt 128 --gen 64 --sizes 1 8 32

`off` is the default, `on` the mode of `load(..., batch_invariant=True)`. `neighbours` keeps all
shapes: is a sequence the same beside others, and elsewhere in its batch? `answers` counts how many
answers of a trained model change with the batch size: to the demo's questions, or with --text how
a text goes on, of whose own tokens a share is right. A part that fails is reported, and the others
go on.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.command import (
    add_generation,
    add_layers,
    add_model,
    add_out,
    add_weights,
    make_main,
)
from benchmarks.decode import parse_policy
from benchmarks.invariance_answers import answer_rows
from benchmarks.invariance_cases import KINDS, Compared, Run, Sequences, cases, some_sequences
from benchmarks.invariance_kernels import kernel_rows
from benchmarks.random_model import MODELS, make_config, make_model
from benchmarks.report import LiveTable
from dials_jax import sharding
from dials_jax.caching.parse import parse_cache
from dials_jax.config import MeshConfig, ModelConfig
from dials_jax.errors import require
from dials_jax.evaluation.timing import time_in_turns
from dials_jax.loading import load, read_config
from dials_jax.models.model import Model
from dials_jax.sampling.confidence import Confidence
from dials_jax.sampling.generate import generate

PARTS = ("kernels", "table", "neighbours", "answers", "speed")
WAYS = ("again", "padded", "reversed")
COLUMNS = {
    "part": "<10", "mode": "<4", "case": "<44", "batch": "<9", "sequences": ">9", "tokens": ">10",
    "numbers": ">14", "layer": ">6", "diverged": ">8.2f", "ms": ">9.3f", "against": ">8.3f",
    "took": ">6.1f",
}  # fmt: skip


# -------------------------------------------------------------------------------- the table


def in_batches(run: Run, some: Sequences, rows: np.ndarray, size: int) -> Compared:
    """The results of sequences computed `size` at a time, in this order, as they were given."""
    parts = []
    for first in range(0, len(rows), size):
        own = rows[first : first + size]
        full = np.resize(own, size)  # the last batch is as large as the others
        parts.append(run(some.take(full)).take(slice(len(own))))
    joined = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    return joined.take(np.argsort(rows))


def case_rows(
    runs: Sequence[Run], some: Sequences, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """One case in all batches, and by the other runs, against the first one of all sequences."""
    run, *others = runs
    rows, count = np.arange(len(some.prompts)), len(some.prompts)
    start = time.perf_counter()
    all_at_once = run(some)
    ways: dict[str, Callable[[], Compared]] = {
        str(size): partial(in_batches, run, some, rows, size)
        for size in sorted(set(options.sizes) - {count})
    }
    ways |= {f"data {options.data}": partial(other, some) for other in others}
    by_name = {
        "again": partial(run, some),
        "padded": lambda: run(some.padded()),
        "reversed": partial(in_batches, run, some, rows[::-1], count),
    }
    ways |= {name: by_name[name] for name in options.ways}
    for batch, way in ways.items():
        found = all_at_once.differences(way())
        yield {"batch": batch, "took": time.perf_counter() - start} | found
        start = time.perf_counter()


# ------------------------------------------------------------------------------- the neighbours


def neighbour_rows(run: Run, some: Sequences, others: Sequences) -> Iterator[dict[str, Any]]:
    """One case in batches of one shape: what changes with what stands beside a sequence, with its
    place, and where the batch is filled with copies of it."""
    count = len(some.prompts)
    places = np.arange(count)
    start = time.perf_counter()
    together = run(some)

    def beside_others() -> Compared:
        halves = [run(_mixed(some, others, places % 2 == i)) for i in (0, 1)]
        return jax.tree.map(lambda a, b: np.where(_along(places % 2 == 0, a), a, b), *halves)

    def filled() -> Compared:
        alone = [run(some.take(np.full(count, i))).take([0]) for i in range(count)]
        return jax.tree.map(lambda *x: np.concatenate(x), *alone)

    ways = {
        "others": beside_others,
        "moved": partial(in_batches, run, some, np.roll(places, 3), count),
        "reversed": partial(in_batches, run, some, places[::-1], count),
        "filled": filled,
    }
    for name, way in ways.items():
        found = together.differences(way())
        yield {"batch": name, "took": time.perf_counter() - start} | found
        start = time.perf_counter()


def _mixed(some: Sequences, others: Sequences, own: np.ndarray) -> Sequences:
    """Those of `some` where `own` is True, at their places among those of `others`."""
    rows = np.where(own, np.arange(len(own)), len(own) + np.arange(len(own)))
    both = [
        None if a is None else (jax.numpy if isinstance(a, jax.Array) else np).concatenate([a, b])
        for a, b in zip(some, others, strict=True)
    ]
    return Sequences(*both).take(rows)


def _along(rows: np.ndarray, like: np.ndarray) -> np.ndarray:
    return rows.reshape(-1, *[1] * (like.ndim - 1))


def of_mixed_lengths(some: Sequences, step: int) -> Sequences:
    """The same shape, with up to three quarters of padding on the left, in steps of this part."""
    length = some.prompts.shape[1]
    padding = np.arange(len(some.prompts)) * step % 4 * (length // 4)
    return some._replace(valid=np.arange(length) >= padding[:, None])


# --------------------------------------------------------------------------------- the speed


def speed_rows(
    models: dict[str, Model], options: argparse.Namespace, cache: str
) -> Iterator[dict[str, Any]]:
    """Whole generations over one cache, the modes in turns."""
    model = next(iter(models.values()))
    prompts = some_sequences(model.config, options.batch, options.prompt).prompts
    gen, block = options.timed_gen, options.timed_block
    steps = gen // block if cache == "none" else gen
    sampler = Confidence(gen_length=gen, block_length=block, steps=steps)

    def run(model: Model):
        return [generate(model, prompts, sampler=sampler, cache=parse_cache(cache))]

    times = time_in_turns([partial(run, model) for model in models.values()], options.repeats)
    for mode, found in zip(models, times, strict=True):
        yield {
            "mode": mode, "case": f"{cache}, batch {options.batch}",
            "ms": 1e3 * found.median / found.outs[0].nfe,
            "against": found.median / times[0].median, "seconds": found.seconds,
            "took": found.compile_seconds,
        }  # fmt: skip


# ------------------------------------------------------------------------------ command line


def make(options: argparse.Namespace, mode: str) -> list[Model]:
    """The model on all devices; or on one, and on those of --data."""
    counts = [1, options.data] if options.data else [jax.device_count()]
    how = {"weights": options.weights, "batch_invariant": mode == "on"}
    made = []
    for count in counts:
        mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:count])
        if Path(options.model).is_dir():
            made.append(load(options.model, dtype=options.dtype, mesh=mesh, **how))
        else:
            made.append(make_model(make_config(options.model, options.layers), mesh=mesh, **how))
    return made


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model(parser, names=[*MODELS, "or a model's folder"])
    add_layers(parser)
    add_weights(parser)
    add_generation(parser, gen=64, block=32)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 3, 4, 8, 32])
    parser.add_argument("--caches", nargs="+", default=["none", "prefix", "dual", "es-32-4"])
    parser.add_argument("--policies", nargs="+", default=["full", "static-2", "random-2", "routed"])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.7])
    parser.add_argument("--modes", nargs="+", default=["off", "on"], choices=["off", "on"])
    parser.add_argument("--parts", nargs="+", default=["table"], choices=PARTS)
    parser.add_argument("--what", nargs="+", default=list(KINDS[:3]), choices=KINDS)
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=WAYS)
    parser.add_argument("--data", type=int, help="devices that share a batch, against one device")
    parser.add_argument("--dtype", help="of a model in a folder; default: as stored")
    parser.add_argument("--router", metavar="DIR", help="of the part `answers`")
    parser.add_argument("--text", metavar="FILE", help="of the part `answers`: texts to continue")
    parser.add_argument("--items", type=int, default=256, help="texts to continue")
    parser.add_argument("--repeats", type=int, default=3, help="timed generations of each mode")
    parser.add_argument("--timed-gen", type=int, default=512, help="of the part `speed`, as --gen")
    parser.add_argument("--timed-block", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=1e9, help="start nothing after so many")
    parser.add_argument("--quick", action="store_true", help="few cases: minutes, with compilation")
    add_out(parser)


def shorten(options: argparse.Namespace) -> None:
    """The settings of --quick: what shows most, with few programs."""
    options.layers = options.layers or 8
    options.sizes, options.temperatures = [1, 8], [0.0]
    options.caches, options.policies, options.repeats = ["none", "dual"], ["full"], 2


def units(
    cfg: ModelConfig, options: argparse.Namespace
) -> Iterator[tuple[dict[str, Any], Callable[[], Iterator[dict[str, Any]]]]]:
    """What fails or not by itself: what its rows have in common, and what makes them."""
    models: dict[str, list[Model]] = {}
    for part in options.parts:
        if part == "kernels":
            yield {"part": part}, partial(kernel_rows, cfg)
            continue
        for mode in options.modes:
            models[mode] = models.get(mode) or make(options, mode)
        if part == "speed":
            first = {mode: some[0] for mode, some in models.items()}
            for cache in options.caches:
                yield {"part": part}, partial(speed_rows, first, options, cache)
            continue
        if part == "answers":
            for mode in options.modes:
                about = {"part": part, "mode": mode}
                yield about, partial(answer_rows, models[mode][0], options)
            continue
        for mode in reversed(options.modes):
            for name, runs in cases(models[mode], options):
                about = {"part": part, "mode": mode, "case": name}
                yield from (table if part == "table" else neighbours)(cfg, options, about, runs)


def table(cfg: ModelConfig, options: argparse.Namespace, about: dict[str, Any], runs: list[Run]):
    some = some_sequences(cfg, max(options.sizes), options.prompt)
    yield about, partial(case_rows, runs, some, options)


def neighbours(
    cfg: ModelConfig, options: argparse.Namespace, about: dict[str, Any], runs: list[Run]
):
    """Without padding, and with padding of each sequence's own length."""
    some, others = (some_sequences(cfg, options.batch, options.prompt, seed) for seed in (0, 1))
    yield about, partial(neighbour_rows, runs[0], some, others)
    padded = {"case": f"{about['case']}, lengths"}
    mixed = of_mixed_lengths(some, 1), of_mixed_lengths(others, 3)
    yield about | padded, partial(neighbour_rows, runs[0], *mixed)


def run(options: argparse.Namespace) -> int:
    """Returns: the number of units that failed, and of cases of the mode that differ."""
    if options.quick:
        shorten(options)
    require(
        options.data is None or 1 < options.data <= jax.device_count(),
        f"--data {options.data}: give 2 to {jax.device_count()}, the devices that there are",
    )
    is_folder = Path(options.model).is_dir()
    cfg = read_config(options.model) if is_folder else make_config(options.model, options.layers)
    for policy in options.policies:
        if policy != "routed":
            parse_policy(policy, cfg.num_layers, lambda num_skipped: None)
    for cache in options.caches:
        parse_cache(cache)
    start, failed = time.perf_counter(), 0
    table = LiveTable(COLUMNS, options.out, vars(options))
    for about, make_rows in units(cfg, options):
        if time.perf_counter() - start > options.seconds:
            table.add_row(**about, batch="left out")
            continue
        try:
            for row in make_rows():
                table.add_row(**(about | row))
                failed += table_failed(about | row)
        except Exception:
            failed += 1
            error = traceback.format_exc()
            table.add_row(**about, batch="failed", error=error)
            print(error[-1500:])
    print(f"{failed} failed or differ in the mode, {time.perf_counter() - start:.0f} s")
    return failed


def table_failed(row: dict[str, Any]) -> bool:
    return "error" in row or (row.get("mode") == "on" and bool(row.get("differ")))


main = make_main("invariance", __doc__, add_options, run)

if __name__ == "__main__":
    sys.exit(main())
