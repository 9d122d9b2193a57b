"""What changes with the batch: `python -m benchmarks.invariance --help`.

The same sequences, each with its own key, are computed in batches of several sizes, in the opposite
order and with more padding, and compared bit by bit with one batch of all of them: tokens and their
log-probabilities after a generation, the logits and every layer's output of one forward pass (at
which layer does the first bit differ?), and likelihoods. Weights are random, of the true shape,
unless --model is a folder. Near ties are common among random weights' predictions, so trained
models differ less.

    python -m benchmarks.invariance --layers 8 --modes off on --out invariance.json
    python -m benchmarks.invariance --quick --parts kernels speed table     (`kernels`: on a GPU)

`off` is the default, `on` the mode of `load(..., batch_invariant=True)`. A part that fails is
reported, and the others go on.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
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
from benchmarks.invariance_kernels import kernel_rows
from benchmarks.random_model import MODELS, make_config, make_model, make_routers
from benchmarks.report import LiveTable
from dials_jax import trees
from dials_jax.caching.parse import parse_cache
from dials_jax.compiling import timed_jit
from dials_jax.config import ModelConfig
from dials_jax.evaluation.likelihood import score_pairs
from dials_jax.evaluation.pairs import pad_pairs
from dials_jax.evaluation.timing import time_in_turns
from dials_jax.keys import seed_key
from dials_jax.loading import load, read_config
from dials_jax.models import transformer
from dials_jax.models.model import Model
from dials_jax.nn.policy import Policy
from dials_jax.sampling.confidence import Confidence
from dials_jax.sampling.generate import generate
from dials_jax.skipping.routed import Routed

PARTS = ("kernels", "table", "speed")
ALIGNED = 64  # tokens of extra padding: prompts stay aligned to the tiles of keys
COLUMNS = {
    "part": "<10", "mode": "<4", "case": "<44", "batch": "<9", "sequences": ">9", "tokens": ">10",
    "numbers": ">14", "layer": ">6", "ms": ">9.3f", "against": ">8.3f", "took": ">6.1f",
}  # fmt: skip


class Sequences(NamedTuple):
    """What is computed: prompts, where they are real, and each one's key."""

    prompts: np.ndarray
    valid: np.ndarray | None
    keys: jax.Array

    def take(self, rows: np.ndarray) -> Sequences:
        return Sequences(
            self.prompts[rows], None if self.valid is None else self.valid[rows], self.keys[rows]
        )

    def padded(self) -> Sequences:
        """The same behind more padding."""
        valid = np.ones(self.prompts.shape, bool) if self.valid is None else self.valid
        wider = ((0, 0), (ALIGNED, 0))
        return Sequences(np.pad(self.prompts, wider), np.pad(valid, wider), self.keys)


class Compared(NamedTuple):
    """Results of every sequence, as arrays that lead with it."""

    tokens: np.ndarray
    numbers: np.ndarray
    layers: np.ndarray | None = None  # [B, L], a fingerprint of every layer's output

    def differences(self, other: Compared) -> dict[str, Any]:
        """How much of `other` is not bitwise this."""
        tokens, numbers = self.tokens != other.tokens, _bits(self.numbers) != _bits(other.numbers)
        axes = tuple(range(1, numbers.ndim))
        some = numbers.any(axis=axes) | tokens.any(axis=tuple(range(1, tokens.ndim)))
        found = {
            "sequences": f"{some.sum()}/{some.size}",
            "tokens": f"{tokens.sum()}/{tokens.size}",
            "numbers": f"{numbers.sum()}/{numbers.size}",
            "differ": int(some.sum()),
        }
        if self.layers is not None:
            at = np.flatnonzero((self.layers != other.layers).any(axis=0))
            found["layer"] = str(at[0] + 1) if at.size else "none"
        return found


def _bits(x: np.ndarray) -> np.ndarray:
    return x.view(np.int32) if x.dtype == np.float32 else x


# -------------------------------------------------------------------------- what is compared


def generated(model: Model, some: Sequences, gen: int, block: int, **settings: Any) -> Compared:
    temperature = settings.pop("temperature")
    sampler = Confidence(gen_length=gen, block_length=block, steps=gen, temperature=temperature)
    out = generate(
        model, some.prompts, some.valid, key=some.keys, sampler=sampler, log_probs=True, **settings
    )
    return Compared(np.asarray(out.tokens)[:, -gen:], np.asarray(out.log_probs))


def one_pass(model: Model, some: Sequences, gen: int, policy: Policy | None) -> Compared:
    """Logits of the masked positions, and fingerprints of the layers' outputs there."""
    cfg, wide = model.config, ((0, 0), (0, gen))
    tokens = np.pad(some.prompts, wide, constant_values=cfg.mask_id)
    valid = None if some.valid is None else np.pad(some.valid, wide, constant_values=True)
    batch = model.place_sequences((tokens.astype(np.int32), valid, some.keys))
    (best, chosen, layers), _ = model.run(layers_program, *batch, policy, num_last=gen)
    count = len(tokens)
    layers = np.moveaxis(np.asarray(layers), 1, 0)
    return Compared(np.asarray(best)[:count], np.asarray(chosen)[:count], layers[:count])


@timed_jit("cfg", "num_last")
def layers_program(params, tokens, valid, keys, policy, *, cfg, num_last):
    """The best token and all logits (of every 97th token: a sample) at the last positions; and of
    every layer's output the sum of its bits, which is exact."""

    def observe(h, new):
        last = new[:, -num_last:]
        bits = jax.lax.bitcast_convert_type(last, f"uint{8 * last.dtype.itemsize}")
        weights = jnp.arange(bits[0].size, dtype=jnp.uint32).reshape(bits[0].shape) + 1
        return jnp.sum(bits.astype(jnp.uint32) * weights, axis=(1, 2))

    out = transformer.run_layers(
        cfg, params, tokens, valid, policy, sequence_keys=keys, observe=observe
    )
    h = transformer.shift_to_predicted(cfg, out.h, valid)[:, -num_last:]
    logits = transformer.head_logits(cfg, params, h)
    return jnp.argmax(logits, axis=-1), logits[..., ::97], out.observed


def likelihoods(model: Model, some: Sequences, policy: Policy | None) -> Compared:
    extra = 0 if some.valid is None else ALIGNED
    rows, length = some.prompts[:, extra:].tolist(), some.prompts.shape[1]
    half = len(rows[0]) // 2
    pairs = pad_pairs([(row[:half], row[half:]) for row in rows], model.config, length)
    scores, _ = score_pairs(
        model, pairs, some.keys, np.zeros(len(rows), int), stratum=1, policy=policy
    )
    values = np.asarray(scores.log_likelihood, np.float32)[:, None]
    return Compared(np.asarray(scores.is_greedy)[:, None], values)


# -------------------------------------------------------------------------------- the table


def divergent(routed: Routed, model: Model) -> Routed:
    """Routers whose votes are near a draw, so that sequences skip different layers."""
    layers = routed.router if trees.is_unrolled(routed.router) else [routed.router]
    made = []
    for i, layer in enumerate(layers):
        vote = jax.random.normal(seed_key(i), layer["vote"].shape)
        made.append({**layer, "vote": vote, "vote_bias": jnp.zeros_like(layer["vote_bias"])})
    router = tuple(made) if trees.is_unrolled(routed.router) else made[0]
    return Routed(jax.device_put(router, model_replicated(model)), 0.5)


def model_replicated(model: Model) -> Any:
    return jax.sharding.NamedSharding(model.mesh, jax.sharding.PartitionSpec())


def policy_of(text: str, model: Model) -> Policy | None:
    if text == "routed":
        return divergent(make_routers(model), model)
    return parse_policy(text, model.num_layers, partial(make_routers, model))


def in_batches(run: Callable[[Sequences], Compared], some: Sequences, rows: np.ndarray, size: int):
    """The results of sequences computed `size` at a time, in this order, as they were given."""
    parts = []
    for first in range(0, len(rows), size):
        own = rows[first : first + size]
        full = np.resize(own, size)  # the last batch is as large as the others
        out = run(some.take(full))
        parts.append(jax.tree.map(lambda x, count=len(own): x[:count], out))
    joined = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    back = np.argsort(rows)
    return jax.tree.map(lambda x: x[back], joined)


def cases(
    model: Model, options: argparse.Namespace
) -> Iterator[tuple[str, Callable[[Sequences], Compared]]]:
    """What is computed of the sequences, by name."""
    for policy in options.policies:
        given = policy_of(policy, model)
        yield f"one pass, {policy}", partial(one_pass, model, gen=options.gen, policy=given)
        yield f"likelihood, {policy}", partial(likelihoods, model, policy=given)
        for cache in options.caches:
            for temperature in options.temperatures:
                run = partial(
                    generated, model, gen=options.gen, block=options.block, policy=given,
                    cache=parse_cache(cache), temperature=temperature,
                )  # fmt: skip
                yield f"{cache}, {policy}, temperature {temperature:g}", run


def case_rows(
    run: Callable[[Sequences], Compared], some: Sequences, sizes: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """One case in all batches, against the batch of all sequences."""
    rows, count = np.arange(len(some.prompts)), len(some.prompts)
    start = time.perf_counter()
    all_at_once = run(some)
    ways: dict[str, Callable[[], Compared]] = {
        str(size): partial(in_batches, run, some, rows, size)
        for size in sorted(set(sizes) - {count})
    }
    ways |= {"again": partial(run, some), "padded": lambda: run(some.padded())}
    ways["reversed"] = partial(in_batches, run, some, rows[::-1], count)
    for batch, way in ways.items():
        found = all_at_once.differences(way())
        yield {"batch": batch, "took": time.perf_counter() - start} | found
        start = time.perf_counter()


def some_sequences(cfg: ModelConfig, count: int, length: int) -> Sequences:
    prompts = np.random.default_rng(0).integers(2, min(1000, cfg.vocab_size // 2), (count, length))
    return Sequences(prompts, None, jax.random.split(seed_key(0), count))


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


def make(options: argparse.Namespace, mode: str) -> Model:
    if not Path(options.model).is_dir():
        cfg = make_config(options.model, options.layers)
        return make_model(cfg, weights=options.weights, batch_invariant=mode == "on")
    return load(options.model, weights=options.weights, batch_invariant=mode == "on")


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
    models: dict[str, Model] = {}
    for part in options.parts:
        if part == "kernels":
            yield {"part": part}, partial(kernel_rows, cfg)
            continue
        for mode in options.modes:
            models[mode] = models.get(mode) or make(options, mode)
        if part == "speed":
            for cache in options.caches:
                yield {"part": part}, partial(speed_rows, models, options, cache)
            continue
        some = some_sequences(cfg, max(options.sizes), options.prompt)
        for mode in reversed(options.modes):
            for name, way in cases(models[mode], options):
                about = {"part": part, "mode": mode, "case": name}
                yield about, partial(case_rows, way, some, options.sizes)


def run(options: argparse.Namespace) -> int:
    """Returns: the number of units that failed, and of cases of the mode that differ."""
    if options.quick:
        shorten(options)
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
