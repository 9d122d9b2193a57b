"""What a study of representations will take, from the shapes of its models and a short probe."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dials_jax import trees
from dials_jax.caching.plain import NoCache
from dials_jax.config import MeshConfig, ModelConfig
from dials_jax.estimates import RunEstimate, Speed, activation_bytes
from dials_jax.models.groups import abstract_params
from dials_jax.sampling.sampler import Sampler
from dials_jax.sharding import make_mesh
from dials_jax.skipping.flops import head_flops, layer_flops
from dials_jax.skipping.observing import Observer

PRODUCTS = 3  # sums over the width that an observer adds to a layer, per position
TEMPORARIES = 2  # copies of an accumulator, or of a kept state, while it is brought up to date


def profile_cost(
    cfg: ModelConfig,
    sampler: Sampler,
    observer: Observer,
    prompt_length: int,
    num_prompts: int,
    batch_size: int,
    mesh: MeshConfig,
    speed: Speed,
) -> tuple[RunEstimate, int | float]:
    """The cost of one model's profile, and its seconds without compilation."""
    shape = make_mesh(mesh).shape
    length, width = prompt_length + sampler.gen_length, jnp.dtype(cfg.dtype).itemsize
    batch = -(-batch_size // (shape["data"] * shape["fsdp"]))
    weights = trees.count_parameters(abstract_params(cfg)) * width
    work = sampler.work(cfg, NoCache(), prompt_length)[0]
    calls = 1 if cfg.causal else sampler.count_steps(NoCache())
    answers = len(observer.change_layers) * batch * sampler.gen_length * cfg.d_model * width
    groups = min(observer.num_step_bins, calls)
    sums = groups * (3 * cfg.num_layers + 2) * length * 2 * 4
    observed = layer_flops(cfg, length) + 2 * PRODUCTS * length * cfg.d_model
    per_call = cfg.num_layers * observed + head_flops(cfg, work.head)
    passes = 2 if cfg.causal else calls  # decoding computes each position once, then they are seen
    flops = num_prompts * passes * per_call
    seconds = flops / (speed.flops * len(jax.devices()))
    if cfg.causal:  # every token reads all weights
        reads = -(-num_prompts // batch_size) * sampler.gen_length
        seconds = max(seconds, reads * weights / (speed.memory * len(jax.devices())))
    memory = {
        "weights": weights / (shape["fsdp"] * shape["tensor"]),
        "one layer and logits": activation_bytes(cfg, batch, length, work.head) / shape["tensor"],
        "kept states": TEMPORARIES * answers,
        "sums": TEMPORARIES * sums,
    }
    return RunEstimate(num_prompts * sampler.gen_length, flops, memory), seconds
