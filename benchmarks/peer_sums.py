"""Sums of two GPUs that read each other's memory, against XLA's: `python -m benchmarks.peer_sums`.

A program of MLPs of a model's width, one after the other, with both GPUs on `tensor`, so that each
MLP ends in a sum, which is added to its input and normed. `us` is its time by MLP, and `xla_us`
that with XLA's sums, in turns. `passes`: how often a program goes through all MLPs; 1 shows what a
program costs to start. `differ` is the share of the results' numbers that are not bitwise XLA's,
with a sine for the norm, whose own sum XLA may order in two ways: none may be, since a sum of two
has one order. A row with any makes the exit status 1.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from benchmarks.command import add_model, add_out, make_main
from benchmarks.invariance_kernels import normal
from benchmarks.random_model import make_config
from benchmarks.report import LiveTable
from dials_jax.compiling import KERNELS, compiler_options
from dials_jax.config import MeshConfig
from dials_jax.evaluation.timing import turns
from dials_jax.nn.kernels.hopper_peers import with_flags
from dials_jax.nn.kernels.implementation import pick
from dials_jax.nn.linear import SPLIT_PRODUCT, linear
from dials_jax.nn.norm import xla_rms_norm
from dials_jax.sharding import make_mesh

COLUMNS = {
    "rows": ">6d", "passes": ">6d", "us": ">8.1f", "xla_us": ">8.1f", "against": ">8.3f",
    "differ": ">8.1%",
}  # fmt: skip
ROWS = (32, 256, 512, 2560)
WAYS = ("hopper_peers", "xla")
Weights = tuple[Float[Array, "L D F"], Float[Array, "L F D"]]


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS), help="tokens")
    parser.add_argument("--passes", nargs="+", type=int, default=[1, 20], help="of a program")
    parser.add_argument("--mlps", type=int, default=8, help="of a pass")
    parser.add_argument("--repeats", type=int, default=10, help="turns")
    add_out(parser)


def run(options: argparse.Namespace) -> int:
    mesh = make_mesh(MeshConfig(data=1, tensor=jax.device_count()))
    table, failures = LiveTable(COLUMNS, options.out, vars(options)), 0
    with jax.set_mesh(mesh):
        weights = make_weights(options, mesh)
        for rows in options.rows:
            x = jax.device_put(normal(2, rows, weights[0].shape[1]), NamedSharding(mesh, P()))
            jax.eval_shape(check, x, weights)
            for passes in options.passes:
                # Else XLA may leave a rounding out where it goes on with a sum at once.
                every = {"xla_allow_excess_precision": False}
                exact = [compile_way(way, jnp.sin, passes, x, weights, every) for way in WAYS]
                ours, xla = (np.asarray(p(x, weights).astype(jnp.float32)) for p in exact)
                programs = [compile_way(way, norm, passes, x, weights) for way in WAYS]
                microseconds = time_in_turns(programs, x, weights, options.repeats)
                microseconds /= options.mlps * passes
                differ = float(np.mean(ours != xla))
                table.add_row(
                    rows=rows, passes=passes, us=microseconds[0], xla_us=microseconds[1],
                    against=microseconds[0] / microseconds[1], differ=differ,
                )  # fmt: skip
                failures += differ > 0
    return failures


@with_flags
def check(x: Float[Array, "R D"], weights: Weights) -> Float[Array, "R D"]:
    """Raises: InputError where our sums cannot be made."""
    hidden = linear(x, weights[0][0])
    pick(SPLIT_PRODUCT, x, hidden, weights[1][0], "...D,DF->...F", None, implementation=WAYS[0])
    return x


def make_weights(options: argparse.Namespace, mesh: Mesh) -> Weights:
    """Of all MLPs: to the hidden units, which are split, and back."""
    cfg = make_config(options.model)
    up = normal(0, options.mlps, cfg.d_model, cfg.d_ff, scale=cfg.d_model**-0.5)
    down = normal(1, options.mlps, cfg.d_ff, cfg.d_model, scale=cfg.d_ff**-0.5)
    specs = P(None, None, "tensor"), P(None, "tensor")
    return jax.device_put((up, down), tuple(NamedSharding(mesh, spec) for spec in specs))


def norm(x: Float[Array, "R D"]) -> Float[Array, "R D"]:
    return xla_rms_norm(x, jnp.ones(x.shape[-1]), 1e-5)


@with_flags
def mlps(
    x: Float[Array, "R D"], weights: Weights, then: Callable[[Array], Array], passes: int
) -> Float[Array, "R D"]:
    """Each MLP's output is added to its input, on which `then` is called."""

    def one_pass(_, x):
        for up, down in zip(*weights, strict=True):
            x = then(linear(jax.nn.silu(linear(x, up)), down, split=True, added_to=x))
        return x

    return lax.fori_loop(0, passes, one_pass, x)


def compile_way(
    way: str,
    then: Callable[[Array], Array],
    passes: int,
    x: Float[Array, "R D"],
    weights: Weights,
    options: dict[str, Any] | None = None,
) -> Callable:
    """The program in which all sums are made in one way."""
    with mock.patch.dict(os.environ, {KERNELS: way}):
        lowered = jax.jit(partial(mlps, then=then, passes=passes)).lower(x, weights)
    return lowered.compile((compiler_options() or {}) | (options or {}))


def time_in_turns(
    programs: list[Callable], x: Float[Array, "R D"], weights: Weights, repeats: int
) -> Float[np.ndarray, "programs"]:
    """Medians, in microseconds of a call."""
    seconds: list[list[float]] = [[] for _ in programs]
    for _, number in turns(repeats, len(programs)):
        start = time.perf_counter()
        jax.block_until_ready(programs[number](x, weights))
        seconds[number].append(time.perf_counter() - start)
    return 1e6 * np.median(seconds, axis=1)


main = make_main("peer_sums", __doc__, add_options, run)

if __name__ == "__main__":
    sys.exit(main())
