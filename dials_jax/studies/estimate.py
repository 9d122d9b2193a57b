"""What a study of representations will take, from the shapes of its models alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dials_jax import trees
from dials_jax.caching.plain import NoCache
from dials_jax.config import MeshConfig, ModelConfig
from dials_jax.models.groups import abstract_params
from dials_jax.sampling.sampler import Sampler
from dials_jax.sharding import make_mesh
from dials_jax.skipping.flops import head_flops, layer_flops
from dials_jax.skipping.observing import Observer

PRODUCTS = 3  # sums over the width that an observer adds to a layer, per position
TEMPORARIES = 2  # copies of an accumulator, or of a kept state, while it is brought up to date


class Speed(NamedTuple):
    """What one device does in a second."""

    flops: float
    memory: float  # bytes read and written


class StudyCost(NamedTuple):
    """Of one model. Bytes are per device."""

    weights: float
    states: float  # kept for the next step
    sums: float
    activations: float  # of one layer, and the logits
    flops: float
    seconds: float  # without compilation

    @property
    def memory(self) -> float:
        return self.weights + self.states + self.sums + self.activations


def measure_speed(dtype: str) -> Speed:
    """Times a matmul and an addition on the first device, for a moment."""
    size = 1024 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((size, size), dtype)
    flops = 2 * size**3 / _seconds(lambda x: x @ x, x)
    return Speed(flops, 2 * x.nbytes / _seconds(lambda x: x + 1, x))


def _seconds(fn: Callable[[jax.Array], jax.Array], x: jax.Array) -> float:
    """The shorter of two runs."""
    program = jax.jit(fn).lower(x).compile()
    times = []
    for _ in range(2):
        start = time.perf_counter()
        program(x).block_until_ready()
        times.append(time.perf_counter() - start)
    return min(times)


def estimate_cost(
    cfg: ModelConfig,
    sampler: Sampler,
    observer: Observer,
    prompt_length: int,
    num_prompts: int,
    batch_size: int,
    mesh: MeshConfig,
    speed: Speed,
) -> StudyCost:
    """Time and memory of one model's profile.

    Activations are those of one layer at a time, as XLA plans them; a kernel that does not spread
    attention over all pairs of positions is assumed.
    """
    shape = make_mesh(mesh).shape
    shards = shape["data"] * shape["fsdp"]
    length, width = prompt_length + sampler.gen_length, jnp.dtype(cfg.dtype).itemsize
    batch = -(-batch_size // shards)
    weights = trees.count_parameters(abstract_params(cfg)) * width
    work = sampler.work(cfg, NoCache(), prompt_length)[0]
    calls = 1 if cfg.causal else sampler.count_steps(NoCache())
    answers = len(observer.change_layers) * batch * sampler.gen_length * cfg.d_model * width
    groups = min(observer.num_step_bins, calls)
    sums = groups * (3 * cfg.num_layers + 2) * length * 2 * 4
    layer = batch * length * (8 * cfg.d_model + 2 * cfg.d_ff) * width
    logits = 2 * batch * work.head * cfg.vocab_size * 4
    per_call = cfg.num_layers * (
        layer_flops(cfg, length) + 2 * PRODUCTS * length * cfg.d_model
    ) + head_flops(cfg, work.head)
    passes = 2 if cfg.causal else calls  # decoding computes each position once, then they are seen
    flops = num_prompts * passes * per_call
    seconds = flops / (speed.flops * len(jax.devices()))
    if cfg.causal:  # every token reads all weights
        reads = -(-num_prompts // batch_size) * sampler.gen_length
        seconds = max(seconds, reads * weights / (speed.memory * len(jax.devices())))
    return StudyCost(
        weights=weights / (shape["fsdp"] * shape["tensor"]),
        states=TEMPORARIES * answers,
        sums=TEMPORARIES * sums,
        activations=layer / shape["tensor"] + logits / shape["tensor"],
        flops=flops,
        seconds=seconds,
    )


def describe(label: str, estimate: StudyCost) -> str:
    """One line for a terminal."""
    parts = {
        "weights": estimate.weights,
        "one layer and logits": estimate.activations,
        "kept states": estimate.states,
        "sums": estimate.sums,
    }
    memory = ", ".join(f"{name} {_bytes(x)}" for name, x in parts.items())
    return (
        f"{label}: about {_duration(estimate.seconds)} and {_bytes(estimate.memory)} per device "
        f"({memory}), without compiling"
    )


def _bytes(count: int | float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _duration(seconds: int | float) -> str:
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} hours"
    return f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{max(seconds, 1):.0f} s"
