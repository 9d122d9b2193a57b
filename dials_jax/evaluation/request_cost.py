"""What generations and likelihoods will take, from the lengths of their requests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from dials_jax.caching.cache import Cache
from dials_jax.caching.plain import NoCache
from dials_jax.estimates import (
    RunEstimate,
    activation_bytes,
    cache_bytes,
    device_bytes,
    forward_flops,
    generation_flops,
)
from dials_jax.evaluation.likelihood import ANSWER_CHUNK
from dials_jax.models.model import Model
from dials_jax.sampling.sampler import Sampler
from dials_jax.sharding import num_batch_shards

LOWER_BATCH_SIZE = "lower batch_size, or give a larger mesh"


def generation_cost(
    model: Model, lengths: Sequence[int], sampler: Sampler, cache: Cache | None, batch_size: int
) -> RunEstimate:
    """At most, if every layer runs. Args: lengths: of the prompts, without padding."""
    cfg, longest = model.config, max(lengths)
    flops = sum(
        count * generation_flops(cfg, sampler, cache, length)
        for length, count in Counter(lengths).items()
    )
    batch = _per_device(model, batch_size, sampler.cfg_scale)
    length = longest + sampler.gen_length
    head = max(work.head for work in sampler.work(cfg, cache or NoCache(), longest))
    memory = {
        "weights": device_bytes(model.params),
        "activations": activation_bytes(cfg, batch, length, head),
        "cache": cache_bytes(cfg, cache, batch, length),
    }
    return RunEstimate(len(lengths) * sampler.gen_length, flops, memory)


def likelihood_cost(
    model: Model, pairs: Sequence[tuple[int, int, int]], cfg_scale: float, batch_size: int
) -> RunEstimate:
    """If every layer runs. Args: pairs: tokens of prompt and answer, and how many copies."""
    cfg, halves = model.config, 1 + (cfg_scale > 0)
    flops = sum(
        copies * halves * count * forward_flops(cfg, prompt + answer, answer)
        for (prompt, answer, copies), count in Counter(pairs).items()
    )
    batch = _per_device(model, batch_size, cfg_scale)
    prompt, answer = (max(pair[i] for pair in pairs) for i in (0, 1))
    head = min(answer, ANSWER_CHUNK)
    memory = {
        "weights": device_bytes(model.params),
        "activations": activation_bytes(cfg, batch, prompt + answer, head),
        "cache": 0.0,
    }
    return RunEstimate(sum(answer * copies for _, answer, copies in pairs), flops, memory)


def _per_device(model: Model, batch_size: int, cfg_scale: float) -> int:
    """Sequences; under guidance each is there twice."""
    return (1 + (cfg_scale > 0)) * -(-batch_size // num_batch_shards(model.mesh))
