"""Generates texts, and scores answers, for requests of mixed lengths with few compiled programs.

Nothing here depends on tasks or metrics, so a script or another harness can call it:

prompts = [tokenizer.encode(text) for text in ("1+1=", "How many is 20+22?")]
answers = generate_all(model, prompts, sampler=dj.Confidence(gen_length=8), policy=router)
values = log_likelihoods(model, [(prompt, tokenizer.encode("42")) for prompt in prompts])

Both return results in the order of the requests. `generation_batches` and `likelihood_batches`
yield them batch by batch, each with its cost, and take the requests that remain: a caller that
stores every batch can be killed and continued. The random numbers of a request do not depend on its
batch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from dials_jax.caching.cache import Cache
from dials_jax.caching.plain import NoCache
from dials_jax.data.buckets import batches_by_length, padded_lengths
from dials_jax.data.tasks import Pair
from dials_jax.data.tokenizer import Ids
from dials_jax.errors import require
from dials_jax.evaluation.likelihood import CopyScores, num_copies, score_pairs
from dials_jax.evaluation.pairs import Pairs, check_pairs, pad_arrays
from dials_jax.keys import fold_in_each, seed_key
from dials_jax.models.model import Model
from dials_jax.models.padding import pad_prompts
from dials_jax.nn.policy import Policy
from dials_jax.sampling.generate import generate
from dials_jax.sampling.generation import Generation
from dials_jax.sampling.refill import generate_refilled, may_end_early, why_not_refilled
from dials_jax.sampling.requests import check_arguments, check_batch
from dials_jax.sampling.sampler import Sampler
from dials_jax.skipping.flops import Flops

STRATUM = 16  # masked copies per round; see `draw_masked`
CHECKED_AT_ONCE = 1000  # prompts


def request_hash(request: Any) -> int:
    """Hashes a request's token ids (tuples of Python's integers) to 31 bits, for its random key."""
    digest = hashlib.sha256(repr(request).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def request_keys(seed: int, hashes: Sequence[int]) -> jax.Array:
    """One random key per request, from the seed and its `request_hash`."""
    return fold_in_each(seed_key(seed), np.asarray(hashes, np.uint32))


def as_tuple(ids: Ids) -> tuple[int, ...]:
    return tuple(map(int, ids))


# ----------------------------------------------------------------------------------- generation


class GenerationBatch(NamedTuple):
    """The texts of some of the prompts."""

    requests: list[int]  # indices of the prompts
    answers: Int[np.ndarray, "B G"]
    out: Generation


def generation_batches(
    model: Model,
    prompts: Sequence[Ids],
    *,
    sampler: Sampler,
    policy: Policy | None = None,
    cache: Cache | None = None,
    keys: jax.Array | None = None,
    batch_size: int = 32,
    bucket: int = 64,
    max_programs: int = 4,
    remaining: Ids | None = None,
    refill: bool | None = None,
    is_done: Callable[[int, Int[np.ndarray, "G"]], bool] | None = None,
    log_probs: bool = False,
) -> Iterator[GenerationBatch]:
    """Generates for batches of prompts of similar length, the longest first.

    Where sequences may end early, those that have ended make room for prompts that wait, and each
    is a batch of its own, in the order in which they end (see `dials_jax.sampling.refill`).

    Args:
      keys: one per prompt; None: from seed 0 and the prompt's tokens.
      bucket: prompts are padded to multiples of this length.
      max_programs: the largest number of padded lengths, each of which is compiled.
      remaining: indices of the prompts to generate for; None: all. The padded lengths are chosen
        for all prompts, so they do not depend on it.
      refill: whether sequences make room for others. None: where they may end early (by the
        sampler's `stop_at_eos` or by `is_done`) and the settings allow it.
      is_done: `is_done(prompt, answer)` ends a sequence at a block's end, as a stop string does;
        the answer has [MASK] where nothing is revealed. Only where sequences make room.
      log_probs: keep those of the generated tokens: `Generation.log_probs`.

    Raises: InputError, before the first batch, for a prompt that `generate` refuses, and for
      settings under which sequences cannot make room, if `refill` asks for it.
    """
    require(batch_size > 0, f"batch_size={batch_size} must be positive")
    check_arguments(sampler, cache or NoCache(), batch_size, log_probs)
    if not len(prompts):
        return
    cfg = model.config
    if keys is None:
        keys = request_keys(0, [request_hash(as_tuple(prompt)) for prompt in prompts])
    lengths = [len(prompt) for prompt in prompts]
    sizes = padded_lengths(lengths, bucket, max_programs, batch_size)
    padded = {size for length, size in zip(lengths, sizes, strict=True) if length < size}
    indices = np.arange(len(prompts)) if remaining is None else np.asarray(remaining, int)
    for chosen in batches_by_length([sizes[i] for i in indices], CHECKED_AT_ONCE):
        group = indices[chosen]
        tokens, valid = pad_prompts([prompts[i] for i in group], sizes[group[0]], cfg.pad_id)
        check_batch(cfg, tokens, valid, sampler, cache, policy, group.tolist())
    if refill is None:
        why_not = why_not_refilled(sampler, cache, model.config, model.batch_invariant)
        refill = may_end_early(sampler, is_done is not None) and why_not is None
    if refill:
        for group in batches_by_length([sizes[i] for i in indices], len(indices)):
            own = indices[group]
            yield from _refilled(
                model, prompts, own, keys, is_done, sampler=sampler, policy=policy, cache=cache,
                batch_size=batch_size, length=sizes[own[0]], log_probs=log_probs,
            )  # fmt: skip
        return
    for chosen in batches_by_length([sizes[i] for i in indices], batch_size):
        group = indices[chosen]
        size = sizes[group[0]]
        tokens, valid = pad_prompts([prompts[i] for i in group], size, model.config.pad_id)
        out = generate(
            model,
            tokens,
            valid if size in padded else None,  # one program for the whole bucket
            sampler=sampler,
            policy=policy,
            cache=cache,
            key=keys[group],
            fill_to=batch_size,
            log_probs=log_probs,
        )
        yield GenerationBatch(group.tolist(), out.tokens[:, size:], out)


def _refilled(
    model: Model,
    prompts: Sequence[Ids],
    indices: Int[np.ndarray, "n"],
    keys: jax.Array,
    is_done: Callable[[int, Int[np.ndarray, "G"]], bool] | None,
    **settings: Any,
) -> Iterator[GenerationBatch]:
    """Generates for the prompts at `indices`, all padded to one length."""
    done = None if is_done is None else lambda i, answer: is_done(int(indices[i]), answer)
    chosen = [prompts[i] for i in indices]
    for i, out in generate_refilled(model, chosen, keys=keys[indices], is_done=done, **settings):
        answer = out.tokens[:, -settings["sampler"].gen_length :]
        yield GenerationBatch([int(indices[i])], answer, out)


def generate_all(
    model: Model, prompts: Sequence[Ids], *, sampler: Sampler, **settings: Any
) -> Int[np.ndarray, "N G"]:
    """Generates tokens for every prompt.

    Args:
      settings: those of `generation_batches`.
    """
    answers = np.zeros((len(prompts), sampler.gen_length), np.int32)
    for batch in generation_batches(model, prompts, sampler=sampler, **settings):
        answers[batch.requests] = batch.answers
    return answers


# ----------------------------------------------------------------------------------- likelihood


class LikelihoodBatch(NamedTuple):
    """The scores of some masked copies."""

    requests: Int[np.ndarray, "B"]  # index of each copy's pair
    copies: Int[np.ndarray, "B"]  # number of the copy within its pair
    scores: CopyScores
    flops: Flops


def likelihood_batches(
    model: Model,
    pairs: Sequence[Pair],
    *,
    num_samples: int = 128,
    cfg_scale: float = 0.0,
    policy: Policy | None = None,
    keys: jax.Array | None = None,
    batch_size: int = 32,
    bucket: int = 64,
    max_programs: int = 4,
    remaining: tuple[Ids, Ids] | None = None,
) -> Iterator[LikelihoodBatch]:
    """Scores batches of masked copies of pairs of similar lengths, the longest first.

    Args:
      num_samples: masked copies per pair, a multiple of `STRATUM` or less than it. Only one is run
        if all would be equal; see `num_copies`.
      keys: one per pair; None: from seed 0 and the prompt's tokens, so that the answers of a prompt
        share their masks.
      bucket: pairs are padded to multiples of this length.
      max_programs: the largest number of padded lengths, each of which is compiled.
      remaining: the copies to score: index of the pair, and number of the copy within it. Copies of
        a pair are adjacent. None: all.

    Raises: InputError, before the first batch, for what `pad_pairs` refuses; and if the model
      outputs NaN, because the first choice would look like the best.
    """
    check_num_samples(num_samples)
    require(batch_size > 0, f"batch_size={batch_size} must be positive")
    if not len(pairs):
        return
    checked = check_pairs(list(pairs), model.config)
    if keys is None:
        keys = request_keys(0, [request_hash(as_tuple(prompt)) for prompt, _ in pairs])
    if remaining is None:
        counts = [num_copies(model.config, len(answer), num_samples, policy) for _, answer in pairs]
        remaining = (
            np.repeat(np.arange(len(pairs)), counts),
            np.concatenate(list(map(np.arange, counts))),
        )
    pair_of, copies = (np.asarray(indices, int) for indices in remaining)
    lengths = padded_lengths([len(p) + len(a) for p, a in pairs], bucket, max_programs)
    for members in batches_by_length(lengths, len(pairs)):  # all of one length
        length, longest = lengths[members[0]], max(len(pairs[i][1]) for i in members)
        answer_length = min(-(-longest // bucket) * bucket, length)
        # Once for all copies: checking token by token takes the host longer than a forward pass.
        padded = pad_arrays([checked[i] for i in members], model.config, length, answer_length)
        here = np.flatnonzero(np.isin(pair_of, members))
        for first in range(0, len(here), batch_size):
            chosen = here[first : first + batch_size]
            requests = pair_of[chosen]
            rows = np.searchsorted(members, requests)
            scores, flops = score_pairs(
                model,
                Pairs(*(x[rows] for x in padded)),
                keys[requests],
                copies[chosen],
                stratum=min(STRATUM, num_samples),
                cfg_scale=cfg_scale,
                policy=policy,
                fill_to=batch_size,
            )
            require(
                not np.isnan(scores.log_likelihood).any(),
                "a likelihood is NaN; look for NaN in the model's weights, or for values that "
                "overflow its dtype",
            )
            yield LikelihoodBatch(requests, copies[chosen], scores, flops)


def log_likelihoods(model: Model, pairs: Sequence[Pair], **settings: Any) -> Float[np.ndarray, "N"]:
    """Estimates log p(answer | prompt) in nats of every pair.

    Args:
      settings: those of `likelihood_batches`.
    """
    values: list[list[float]] = [[] for _ in pairs]
    for batch in likelihood_batches(model, pairs, **settings):
        for index, value in zip(batch.requests, batch.scores.log_likelihood, strict=True):
            values[index].append(float(value))
    return np.array([math.fsum(own) / len(own) for own in values])


def check_num_samples(num_samples: int) -> None:
    """Raises: InputError for a number of masked copies that does not fill whole rounds."""
    require(
        num_samples > 0 and num_samples % min(STRATUM, num_samples) == 0,
        f"num_samples={num_samples} must be a multiple of {STRATUM}",
    )
