"""What a run will take, said before it starts: time, tokens, FLOPs and memory.

FLOPs and bytes follow from shapes. Time is that of the first real step or batch, of which `Pace`
makes a line; nothing runs only to be timed, except where a study asks for `measure_speed`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from dials_jax.caching.cache import Cache, Work
from dials_jax.caching.plain import NoCache
from dials_jax.config import ModelConfig
from dials_jax.progress import format_bytes
from dials_jax.sampling.sampler import Sampler
from dials_jax.skipping.flops import head_flops, layer_flops


class RunEstimate(NamedTuple):
    """What a run takes if every layer runs.

    Attributes:
      tokens: generated, scored or trained on.
      memory: bytes per device at the same time, by what takes them.
    """

    tokens: int
    flops: int | float
    memory: Mapping[str, float]

    @property
    def bytes(self) -> int | float:
        return sum(self.memory.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {format_bytes(x)}" for name, x in self.memory.items() if x)
        return (
            f"{self.tokens:,} tokens, {self.flops:.2g} FLOPs, about {format_bytes(self.bytes)} "
            f"per device ({parts})"
        )

    def warning(self, remedy: str) -> str | None:
        """A line if the devices have less memory than this; None if it fits, or is not known.

        Args:
          remedy: what to change.
        """
        limit = device_memory()
        if limit is None or self.bytes <= limit:
            return None
        has, needs = format_bytes(limit), format_bytes(self.bytes)
        return f"this will not fit: it needs about {needs} per device, which has {has}; {remedy}"


def print_cost(
    label: str, cost: RunEstimate, remedy: str, say: Callable[[str], Any] = print
) -> None:
    """Says what a run takes, and in a line of its own if it will not fit. The first process does.

    Args:
      remedy: what to change if it will not fit.
    """
    if jax.process_index() == 0:
        say(f"{label}: {cost}")
        if warning := cost.warning(remedy):
            say(warning)


# ------------------------------------------------------------------------------------------ FLOPs


def forward_flops(cfg: ModelConfig, length: int, head: int | None = None) -> int | float:
    """One call on one sequence. Args: head: positions with logits; None: all."""
    return cfg.num_layers * layer_flops(cfg, length) + head_flops(
        cfg, length if head is None else head
    )


def training_flops(cfg: ModelConfig, length: int, *, frozen: bool, remat: bool) -> int | float:
    """One sequence forward and backward.

    The gradients of activations cost a forward pass, those of weights another one, which a frozen
    model does not need, and `remat` computes the first one again.
    """
    return (3 - frozen + remat) * forward_flops(cfg, length)


def generation_flops(
    cfg: ModelConfig, sampler: Sampler, cache: Cache | None, prompt_length: int
) -> int | float:
    """One sequence, all of its steps; where a cache makes several kinds of calls, about.

    The dearest kind begins a block (without blocks: the generation), the mean of the cheaper ones
    makes the other steps.
    """
    length = prompt_length + sampler.gen_length
    work = sampler.work(cfg, cache or NoCache(), prompt_length)
    calls = [_call_flops(cfg, w, length) for w in work]
    steps = sampler.count_steps(cache or NoCache())
    block = getattr(sampler, "block_length", None) or sampler.gen_length
    starts = min(-(-sampler.gen_length // block), steps)
    dearest = max(calls)
    others = np.mean([flops for flops in calls if flops < dearest] or dearest)
    return (1 + (sampler.cfg_scale > 0)) * float(starts * dearest + (steps - starts) * others)


def _call_flops(cfg: ModelConfig, work: Work, length: int) -> float:
    run, projected = (np.array(x) for x in (work.tokens, work.projected or work.tokens))
    layers = layer_flops(cfg, run, work.keys or length, projected)
    return float(np.sum(layers) + head_flops(cfg, work.head))


# ----------------------------------------------------------------------------------------- memory


def device_bytes(tree: PyTree) -> int | float:
    """Bytes of arrays, or of shapes with shardings, on the device that holds the most of them."""
    return float(sum(map(_shard_bytes, jax.tree.leaves(tree))))


def _shard_bytes(x: Any) -> int:
    held = getattr(x, "sharding", None)
    shape = x.shape if held is None else held.shard_shape(x.shape)
    return int(np.prod(shape, dtype=np.int64)) * x.dtype.itemsize


def activation_bytes(cfg: ModelConfig, batch: int, length: int, head: int) -> int | float:
    """One layer at a time, as XLA plans it, and float32 logits, twice.

    Args:
      batch: sequences per device.
      head: positions with logits.
    """
    layer = batch * length * (8 * cfg.d_model + 2 * cfg.d_ff) * _width(cfg)
    return layer + _attention_bytes(cfg, batch, length) + 2 * batch * head * cfg.vocab_size * 4


def kept_bytes(cfg: ModelConfig, batch: int, length: int, remat: bool) -> int | float:
    """What all layers keep for the backward pass: under `remat` their inputs alone."""
    if remat:
        return cfg.num_layers * batch * length * cfg.d_model * _width(cfg)
    one = batch * length * (8 * cfg.d_model + 3 * cfg.d_ff) * _width(cfg)
    return cfg.num_layers * (one + _attention_bytes(cfg, batch, length))


def _width(cfg: ModelConfig) -> int:
    """Bytes of an activation. XLA computes bfloat16 as float32 on a CPU."""
    return 4 if jax.default_backend() == "cpu" else jnp.dtype(cfg.dtype).itemsize


def _attention_bytes(cfg: ModelConfig, batch: int, length: int) -> int:
    """Scores and probabilities of all pairs of positions, which a fused kernel never holds."""
    return 12 * batch * cfg.num_heads * length**2 if jax.default_backend() == "cpu" else 0


def cache_bytes(cfg: ModelConfig, cache: Cache | None, batch: int, length: int) -> int | float:
    """Keys and values of all layers, where a cache or a causal model keeps them."""
    if isinstance(cache or NoCache(), NoCache) and not cfg.causal:
        return 0.0
    width = jnp.dtype(cfg.dtype).itemsize
    return 2.0 * cfg.num_layers * batch * length * cfg.num_kv_heads * cfg.head_dim * width


def device_memory() -> int | float | None:
    """Bytes that a device may hold. On a CPU the machine's, divided among its devices."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return float(stats["bytes_limit"])
    if jax.default_backend() != "cpu":
        return None
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not on every system
        return None
    return total / jax.local_device_count()


# ----------------------------------------------------------------------------------------- a probe


class Speed(NamedTuple):
    """What one device does in a second."""

    flops: int | float
    memory: float  # bytes read and written


def measure_speed(dtype: str) -> Speed:
    """Times a matmul and an addition on the first device, for a moment."""
    size = 1024 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((size, size), dtype)
    flops = 2 * size**3 / _shorter_of_two(lambda x: x @ x, x)
    return Speed(flops, 2 * x.nbytes / _shorter_of_two(lambda x: x + 1, x))


def _shorter_of_two(fn: Callable[[jax.Array], jax.Array], x: jax.Array) -> int | float:
    program = jax.jit(fn).lower(x).compile()
    times = []
    for _ in range(2):
        start = time.perf_counter()
        program(x).block_until_ready()
        times.append(time.perf_counter() - start)
    return min(times)
