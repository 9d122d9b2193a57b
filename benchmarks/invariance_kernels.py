"""Whether the kernels of the batch-invariant mode sum a row alike in any batch, and their times.

A part of `benchmarks.invariance`, for a Hopper GPU: products of a model's shapes for 1 to 2,048
rows, RMS norms, attention and sums, each against XLA's, which may choose another order.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dials_jax.compiling import compiler_options
from dials_jax.config import ModelConfig
from dials_jax.errors import require
from dials_jax.keys import seed_key
from dials_jax.nn.kernels import row_sums
from dials_jax.nn.kernels.cudnn_attention import run_cudnn
from dials_jax.nn.kernels.dispatch import run_tiles, xla_attention
from dials_jax.nn.kernels.hopper_matmul import plain
from dials_jax.nn.kernels.hopper_rows import multiply_rows, norm_rows, swiglu_rows
from dials_jax.nn.kernels.per_device import on_hopper
from dials_jax.nn.kv import KV
from dials_jax.nn.mask import Mask
from dials_jax.nn.norm import xla_rms_norm

MOST = 2048  # rows, of which all others are a part
PIECES = ((5, 1), (3, 513))  # first row and number of rows
TIMED = (512, 6144)
Call = tuple[Callable, tuple[Array, ...]]


def normal(seed: int, *shape: int, scale: float = 1.0) -> Array:
    return (scale * jax.random.normal(seed_key(seed), shape)).astype(jnp.bfloat16)


def compiled(calls: Sequence[Call]) -> list[Callable]:
    """The programs of some calls; XLA compiles each on a core of its own."""
    with ThreadPoolExecutor() as pool:
        lowered = [jax.jit(fn).lower(*args) for fn, args in calls]
        return list(pool.map(lambda x: x.compile(compiler_options()), lowered))


def milliseconds(program: Callable, args: tuple[Array, ...], repeats: int = 20) -> float:
    """Of one call, of many that run one after the other."""
    jax.block_until_ready(program(*args))
    start = time.perf_counter()
    jax.block_until_ready([program(*args) for _ in range(repeats)])
    return 1e3 * (time.perf_counter() - start) / repeats


def differing_rows(fn: Callable, x: Array, *rest: Array) -> tuple[int, int, Array]:
    """How many rows, over all pieces, are not bitwise what they are among all; of how many; and
    the result of all."""
    pieces = [(first, size) for first, size in PIECES if first + size <= len(x)]
    parts = [x, *(x[first : first + size] for first, size in pieces)]
    programs = compiled([(fn, (part, *rest)) for part in parts])
    outs = [program(part, *rest) for program, part in zip(programs, parts, strict=True)]
    whole, *others = (np.asarray(y.view(jnp.uint8)).reshape(len(y), -1) for y in outs)
    differ = sum(
        int((y != whole[first : first + size]).any(axis=1).sum())
        for y, (first, size) in zip(others, pieces, strict=True)
    )
    return differ, sum(size for _, size in pieces), outs[0]


def products(cfg: ModelConfig) -> dict[str, tuple[Callable, Callable, Array]]:
    """By name: the kernel, XLA's way, and the weight."""
    d, f, h = cfg.d_model, cfg.d_ff, cfg.head_dim
    qkv = (cfg.num_heads + 2 * cfg.num_kv_heads) * h
    vocabulary = cfg.vocab_size + -cfg.vocab_size % 128
    in_float = jnp.float32

    def xla(x, w, dtype=None):
        return jnp.matmul(x, w, preferred_element_type=dtype)

    head = partial(multiply_rows, dtype=in_float), partial(xla, dtype=in_float)
    return {
        "queries, keys, values": (multiply_rows, xla, normal(1, d, qkv, scale=d**-0.5)),
        "way out": (multiply_rows, xla, normal(2, cfg.num_heads * h, d, scale=d**-0.5)),
        "gate, up and SwiGLU": (swiglu_rows, plain, normal(3, d, 2 * f, scale=d**-0.5)),
        "way down": (multiply_rows, xla, normal(4, f, d, scale=f**-0.5)),
        "head": (*head, normal(5, d, vocabulary, scale=d**-0.5)),
        "router": (*head, normal(6, d, 512, scale=d**-0.5)),
    }


def product_row(name: str, kernel: Callable, xla: Callable, weight: Array) -> dict[str, Any]:
    depth = weight.shape[0]
    x = normal(0, 640 if name == "head" else MOST, depth)
    few, by_xla = differing_rows(kernel, x, weight), differing_rows(xla, x, weight)
    with jax.default_matmul_precision("highest"):
        exact = xla(x[:64].astype(jnp.float32), weight.astype(jnp.float32))
    error = few[2][:64].astype(jnp.float32) - exact
    off = float(jnp.sqrt(jnp.mean(error**2) / jnp.mean(exact.astype(jnp.float32) ** 2)))
    times = {}
    for rows in TIMED[:1] if name == "head" else TIMED:
        args = normal(0, rows, depth), weight
        pair = compiled([(kernel, args), (xla, args)])
        found = [milliseconds(program, args) for program in (*pair, *pair)]
        times[rows] = {"ms": min(found[::2]), "xla_ms": min(found[1::2])}
    first = times[TIMED[0]]
    return {
        "case": name, "sequences": f"{few[0]}/{few[1]}", "differ": few[0], "off": off,
        "numbers": f"xla {by_xla[0]}/{by_xla[1]}", "times": times, "ms": first["ms"],
        "against": first["ms"] / first["xla_ms"],
    }  # fmt: skip


def norm_row(cfg: ModelConfig) -> dict[str, Any]:
    scale = normal(1, cfg.d_model)
    kernel = partial(norm_rows, eps=cfg.norm_eps)
    xla = partial(xla_rms_norm, eps=cfg.norm_eps)
    return product_row("RMS norm", kernel, xla, scale)


def sum_row(cfg: ModelConfig) -> dict[str, Any]:
    """The normaliser of the softmax over the vocabulary."""
    x = 5 * jax.random.normal(seed_key(0), (640, cfg.vocab_size))
    ways = row_sums.ordered_logsumexp, row_sums.xla_logsumexp
    few, xla = (differing_rows(fn, x) for fn in ways)
    args = (x[:512],)
    ms, xla_ms = (milliseconds(program, args) for program in compiled([(fn, args) for fn in ways]))
    return {
        "case": "sum over the vocabulary", "sequences": f"{few[0]}/{few[1]}", "differ": few[0],
        "numbers": f"xla {xla[0]}/{xla[1]}", "ms": ms, "against": ms / xla_ms,
    }  # fmt: skip


def attention_row(cfg: ModelConfig, num_queries: int, num_keys: int) -> dict[str, Any]:
    """A batch of 8 against the same sequences alone, in threes, and with less padding."""
    q = normal(0, 8, num_queries, cfg.num_heads, cfg.head_dim)
    kv = [normal(i, 8, num_keys, cfg.num_kv_heads, cfg.head_dim) for i in (1, 2)]
    valid = jnp.arange(num_keys) >= 64 * (jnp.arange(8) % 3)[:, None]

    def kernel(q, k, v, valid):
        return run_tiles(q, KV(k, v), Mask(valid))

    def cudnn(q, k, v, valid):
        return run_cudnn(q, KV(k, v), Mask(valid))

    args, differ = (q, *kv, valid), {}
    parts = [[x[rows] for x in args] for rows in (slice(0, 1), slice(3, 6))]
    if num_queries < num_keys:
        parts.append([q[1:2], *(x[1:2, 64:] for x in args[1:])])  # less padding
    for name, fn in {"kernel": kernel, "cudnn": cudnn}.items():
        whole, *others = (
            program(*part)
            for program, part in zip(
                compiled([(fn, part) for part in (args, *parts)]), (args, *parts), strict=True
            )
        )
        rows = slice(0, 1), slice(3, 6), slice(1, 2)
        differ[name] = [int(jnp.sum(y != whole[at])) for y, at in zip(others, rows, strict=False)]
    exact = xla_attention(
        *[q[:1].astype(jnp.float32), KV(*(x[:1].astype(jnp.float32) for x in kv)), Mask(valid[:1])]
    )
    off = float(jnp.max(jnp.abs(kernel(*[x[:1] for x in args]).astype(jnp.float32) - exact)))
    calls = [
        (lambda q, k, v, run=run: run(q, KV(k, v), Mask()), args[:3])
        for run in (run_tiles, run_cudnn)
    ]
    ms, xla_ms = (milliseconds(program, args[:3]) for program in compiled(calls))
    return {
        "case": f"attention, {num_queries} queries, {num_keys} keys",
        "sequences": "/".join(map(str, differ["kernel"])), "differ": sum(differ["kernel"]),
        "numbers": f"cudnn {'/'.join(map(str, differ['cudnn']))}", "off": off, "ms": ms,
        "against": ms / xla_ms,
    }  # fmt: skip


def kernel_rows(cfg: ModelConfig) -> Iterator[dict[str, Any]]:
    """One row for each kernel; one that fails does not end the others.

    Raises: InputError without a Hopper GPU.
    """
    require(on_hopper(), "--parts kernels needs a Hopper GPU; leave it out")
    runs = [partial(attention_row, cfg, *sizes) for sizes in ((768, 768), (64, 768), (16, 768))]
    runs += [partial(product_row, name, *of) for name, of in products(cfg).items()]
    runs += [partial(norm_row, cfg), partial(sum_row, cfg)]
    for run in runs:
        start = time.perf_counter()
        try:
            row = run()
        except Exception:
            traceback.print_exc()
            row = {
                "case": f"failed: {run.func.__name__}",
                "error": traceback.format_exc(),
                "mode": "on",
            }
        yield row | {"took": time.perf_counter() - start}
