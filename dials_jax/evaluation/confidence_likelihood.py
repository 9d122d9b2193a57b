"""The log-likelihood of an answer along one order of revealing it, as iLLaDA scores choices.

The whole answer is masked. Each step adds the log-probability of the token that the model is surest
of among the answer's own, and reveals it. One model call per token, and nothing is random.

Source: `eval_illada.py` of ML-GSAI/LLaDA, `llh=confidence`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dials_jax import sharding
from dials_jax.compiling import timed_jit
from dials_jax.config import typed
from dials_jax.diffusion.objectives import masked_log_probs
from dials_jax.errors import require
from dials_jax.evaluation.pairs import Pairs, align_pairs, pad_pairs
from dials_jax.models import transformer
from dials_jax.models.model import Model, sequence_keys
from dials_jax.nn.kernels.row_sums import row_sum
from dials_jax.nn.policy import Policy, check_policy


class ConfidenceScores(NamedTuple):
    """The log-likelihoods of a batch, and how they came about."""

    log_likelihood: Float[Array, "B"]  # nats
    order: Int[Array, "A B"]  # position in the answer that each step revealed; -1: none was left
    gates: Bool[Array, "A L B"]


@typed
def confidence_log_likelihood(
    model: Model,
    prompt_ids: Sequence[int],
    answer_ids: Sequence[int],
    *,
    append_eos: bool = False,
    policy: Policy | None = None,
    key: jax.Array | None = None,
) -> float:
    """log p(answer | prompt) in nats along the order in which the model is surest of the answer.

    Args:
      append_eos: the model sees an end of text behind the answer (iLLaDA's `padd_eos`).
      key: of random policies; None: the key of seed 0.

    Raises: InputError for a causal model, an empty answer, and a pair that is too long.
    """
    pairs = [(prompt_ids, answer_ids)]
    scores = confidence_scores(model, pairs, append_eos=append_eos, policy=policy, key=key)
    return float(scores.log_likelihood[0])


def confidence_scores(
    model: Model,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    append_eos: bool = False,
    policy: Policy | None = None,
    key: jax.Array | None = None,
) -> ConfidenceScores:
    """As `confidence_log_likelihood` for a batch of pairs (prompt, answer), with the order."""
    cfg = model.config
    cfg.require_mask()
    require(
        not cfg.time_conditioning,
        "a likelihood by confidence has no denoising time; take log_likelihood for this model",
    )
    check_policy(policy)
    padded = pad_pairs(list(pairs), cfg)
    tail = np.full((len(pairs), int(append_eos)), cfg.eos_id, np.int32)
    total = padded.tokens.shape[1] + tail.shape[1]
    require(
        total <= cfg.max_length,
        f"{total} tokens, the end of text counted, for {cfg.max_length} positions; shorten them",
    )
    padded = align_pairs(model, padded)
    batch = model.place_sequences((padded, tail, sequence_keys(key, len(pairs))))
    scores, _ = model.run(confidence_program, *batch, policy)
    return jax.tree.map(lambda x: x[..., : len(pairs)], sharding.to_host(scores))


@timed_jit("cfg")
def confidence_program(
    params, pairs: Pairs, tail: Int[Array, "B _"], keys, policy, *, cfg
) -> ConfidenceScores:
    """All steps of a batch, as many as the longest answer has tokens."""
    length = pairs.in_answer.shape[1]
    first = pairs.tokens.shape[1] - length
    prompts, answers = pairs.tokens[:, :first], pairs.tokens[:, first:]
    valid = jnp.concatenate([pairs.valid, jnp.ones_like(tail, bool)], axis=1)
    starts = jnp.argmax(pairs.in_answer, axis=1)

    def step(masked: Bool[Array, "B A"], number: Int[Array, ""]):
        seen = jnp.where(masked, cfg.mask_id, answers)
        tokens = jnp.concatenate([prompts, seen, tail], axis=1)
        out = transformer.run_layers(
            cfg, params, tokens, valid, policy, step=number, sequence_keys=keys
        )
        h = transformer.shift_to_predicted(cfg, out.h, valid)[:, first : first + length]
        logits = transformer.apply_subs(cfg, transformer.head_logits(cfg, params, h))
        log_probs = masked_log_probs(logits, answers, masked)
        surest = jnp.argmax(jnp.where(masked, log_probs, -jnp.inf), axis=1)
        gained = jnp.take_along_axis(log_probs, surest[:, None], axis=1)[:, 0]  # 0 if none is left
        order = jnp.where(jnp.any(masked, axis=1), surest - starts, -1)
        return masked & (jnp.arange(length) != surest[:, None]), (gained, order, out.gates)

    _, (gained, order, gates) = lax.scan(step, pairs.in_answer, jnp.arange(length))
    # From the last step to the first, since a shorter answer ends in zeros.
    return ConfidenceScores(row_sum(gained[::-1].T), order, gates)
