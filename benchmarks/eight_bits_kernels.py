"""Whether the e4m3 kernels of Hopper GPUs multiply right at any number of rows, on every GPU.

    python -m benchmarks.eight_bits_kernels                  on as many GPUs as there are

Products of a model's shapes, for numbers of rows that fill no tile. `off` is the root mean square
of what differs from XLA's sums in float32, over that of the result, in per cent; rounding it to
bfloat16, which the head's logits are spared, is 0.17 of it. `split`: rows that are not bitwise what
they are among all 2,048, since a row has one order of sums in any batch. `rounded`: rows whose
inputs are rounded otherwise than by the formula. On several GPUs each multiplies its own sequences,
and `devices` says how many of the rows are not bitwise those of one GPU. A row that fails
`--most-off`, or has a count, makes the exit status 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from benchmarks.command import add_model, add_out, make_main
from benchmarks.invariance_kernels import compiled, normal
from benchmarks.random_model import make_config
from benchmarks.report import LiveTable
from dials_jax.config import MeshConfig, ModelConfig
from dials_jax.errors import require
from dials_jax.nn.block import VOCABULARY_UNIT
from dials_jax.nn.eight_bits import Quantised, quantise, xla_matmul
from dials_jax.nn.kernels.hopper_matmul import matmul_e4m3
from dials_jax.nn.kernels.hopper_quantise import quantise_rows
from dials_jax.nn.kernels.per_device import on_hopper, sequences_per_device
from dials_jax.sharding import BATCH_AXES, make_mesh

ROWS = (1, 3, 7, 13, 100, 129, 201, 513, 1001, 2048)
COLUMNS = {
    "product": "<20", "rows": ">6d", "off": ">7.3f", "split": ">6d", "rounded": ">8d",
    "devices": ">8d",
}  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS), help="of a product")
    parser.add_argument("--most-off", type=float, default=0.5, help="per cent")
    add_out(parser)


def run(options: argparse.Namespace) -> int:
    require(on_hopper(), "the kernels need Hopper GPUs and JAX 0.11; run it there")
    table, failures = LiveTable(COLUMNS, options.out, vars(options)), 0
    for row in kernel_rows(make_config(options.model), sorted(options.rows)):
        table.add_row(**row)
        counts = row["split"], row["rounded"], row.get("devices", 0)
        failures += row["off"] > options.most_off or any(counts)
    return failures


def products(cfg: ModelConfig) -> dict[str, tuple[int, int, dict[str, Any]]]:
    """By name: terms of a sum, columns of the weight, and further arguments of `matmul_e4m3`."""
    d, f, h = cfg.d_model, cfg.d_ff, cfg.head_dim
    vocabulary = cfg.vocab_size + -cfg.vocab_size % VOCABULARY_UNIT
    return {
        "queries, keys, values": (d, (cfg.num_heads + 2 * cfg.num_kv_heads) * h, {}),
        "way out": (cfg.num_heads * h, d, {}),
        "gate, up and SwiGLU": (d, 2 * f, {"halves": 2}),
        "way down": (f, d, {}),
        "head": (d, vocabulary, {"dtype": jnp.float32}),
    }


def kernel_rows(cfg: ModelConfig, sizes: list[int]) -> Iterator[dict[str, Any]]:
    """The rows of the table."""
    for number, (name, (depth, columns, how)) in enumerate(products(cfg).items()):
        weight = quantise(normal(number, columns, depth, scale=depth**-0.5), "fp8", 1)
        x = normal(10 + number, sizes[-1], depth)
        x = x * jnp.exp(jnp.linspace(-3, 3, len(x)))[:, None].astype(x.dtype)
        kernel, formula = partial(matmul_e4m3, **how), partial(reference, **how)
        parts = [x[:size] for size in sizes]
        calls = [(fn, (part, weight)) for fn in (kernel, formula) for part in parts]
        calls += [(fn, (part,)) for fn in (quantise_rows, by_formula) for part in parts]
        outs = [program(*args) for program, (_, args) in zip(compiled(calls), calls, strict=True)]
        ours, exact, rounded, expected = (
            outs[i * len(sizes) : (i + 1) * len(sizes)] for i in range(4)
        )
        for i, size in enumerate(sizes):
            error, norm = ours[i].astype(jnp.float32) - exact[i], jnp.linalg.norm(exact[i])
            row = {
                "product": name, "rows": size, "off": 100 * float(jnp.linalg.norm(error) / norm),
                "split": differ(ours[i], ours[-1][:size]),
                "rounded": differ(rounded[i].values, expected[i].values)
                + differ(rounded[i].scales, expected[i].scales),
            }  # fmt: skip
            yield row | on_all_devices(kernel, parts[i], weight, ours[i])


def on_all_devices(
    kernel: Callable[..., Array], x: Float[Array, "R D"], weight: Quantised, one: Array
) -> dict[str, int]:
    """How many rows differ where each device has as many, each of them all rows of `x` once."""
    count = jax.device_count()
    if count == 1:
        return {}
    mesh = make_mesh(MeshConfig(data=count))
    sequences = jnp.repeat(x[None], count, axis=0)
    with jax.set_mesh(mesh):
        placed = jax.device_put(sequences, NamedSharding(mesh, P(BATCH_AXES)))
        whole = jax.device_put(weight, NamedSharding(mesh, P()))
        out = jax.jit(partial(sequences_per_device, kernel))(placed, whole)
    return {"devices": sum(differ(y, one) for y in jax.device_get(out))}


def reference(
    x: Float[Array, "R D"], weight: Quantised, halves: int = 1, dtype: Any = None
) -> Float[Array, "R F"]:
    """In float32, whatever the dtype of the kernel's result."""
    y = xla_matmul(x, weight)
    if halves == 1:
        return y
    gate, up = jnp.split(y, 2, axis=-1)
    return jax.nn.silu(gate) * up


def by_formula(x: Float[Array, "R D"]) -> Quantised:
    return quantise(x, "fp8", 1)


def differ(a: Array, b: Array) -> int:
    """How many rows are not bitwise equal."""
    a, b = (jnp.asarray(x).reshape(len(x), -1).astype(jnp.float32) for x in (a, b))
    return int((a != b).any(axis=1).sum())


main = make_main("eight_bits_kernels", __doc__, add_options, run)

if __name__ == "__main__":
    sys.exit(main())
