"""The log-likelihood of an answer given a prompt, as LLaDA evaluates it.

Of a masked diffusion model it is a Monte-Carlo estimate: the mean of -CE / p over masked copies of
the answer, where p is the share of the answer that is masked in the copy. Copies are stratified in
rounds: within a round, the numbers of masked tokens are spread evenly over 1..L. A causal model's
is exact: of each answer one copy is scored, in which no token is masked and every one counts.

Source: `get_log_likelihood.py` and `eval_llada.py` of ML-GSAI/LLaDA.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from dials_jax import sharding
from dials_jax.compiling import timed_jit
from dials_jax.config import ModelConfig, typed
from dials_jax.diffusion.guidance import guide, repeat_batch, with_unconditional
from dials_jax.diffusion.objectives import masked_log_probs
from dials_jax.errors import InputError, require
from dials_jax.evaluation.pairs import Pairs, align_pairs, pad_pairs
from dials_jax.evaluation.position_chunks import map_position_chunks
from dials_jax.keys import threefry_key
from dials_jax.models import transformer
from dials_jax.models.model import Model, as_ids, check_shapes, check_vocabulary, sequence_keys
from dials_jax.nn.kernels.row_sums import row_sum
from dials_jax.nn.policy import Policy, check_policy, uses_keys
from dials_jax.nn.stack import Executor
from dials_jax.skipping.flops import Flops, count_flops

ANSWER_CHUNK = 128  # positions whose logits are in memory at a time
WHOLE = -1  # number of the copy whose whole answer is masked; it is no part of an estimate


class CopyScores(NamedTuple):
    """The estimate of each masked copy; under guidance R = 2 B, otherwise R = B."""

    log_likelihood: Float[Array, "B"]  # nats
    gates: Bool[Array, "L R"]
    masked_share: Float[Array, "B"]  # masked share of the answer
    is_greedy: Bool[Array, "B"]  # all masked tokens are the most probable ones


@typed
def log_likelihood(
    model: Model,
    prompt_ids: Sequence[int],
    answer_ids: Sequence[int],
    num_samples: int = 128,
    batch_size: int = 16,
    cfg_scale: float = 0.0,
    policy: Policy | None = None,
    key: jax.Array | None = None,
) -> float:
    """Estimates log p(answer | prompt) in nats; its expectation is a lower bound.

    Args:
      num_samples: masked copies; a multiple of `batch_size`. Only one is run if all would be equal,
        as for a causal model (see `num_copies`).
      batch_size: copies per round, over which the numbers of masked tokens are stratified.
      key: from `jax.random.key`; None: the key of seed 0.
    """
    check_policy(policy)
    _require_guidance(cfg_scale)
    require(batch_size > 0, f"batch_size={batch_size} must be positive")
    require(
        num_samples > 0 and num_samples % batch_size == 0,
        f"num_samples={num_samples} must be a multiple of batch_size={batch_size}",
    )
    pairs = pad_pairs([(prompt_ids, answer_ids)], model.config)
    num_samples = num_copies(model.config, len(answer_ids), num_samples, policy)
    per_batch = min(batch_size, num_samples)
    copies = jax.tree.map(lambda x: np.repeat(x, per_batch, axis=0), pairs)
    keys = jnp.broadcast_to(sequence_keys(key, 1), (per_batch,))
    estimates = []
    for first in range(0, num_samples, per_batch):
        numbers = np.arange(first, first + per_batch)
        scores, _ = score_pairs(
            model, copies, keys, numbers, stratum=batch_size, cfg_scale=cfg_scale, policy=policy
        )
        estimates.append(np.mean(scores.log_likelihood))
    return float(np.mean(estimates))


def num_copies(
    cfg: ModelConfig, answer_length: int, num_samples: int, policy: Policy | None
) -> int:
    """The number of masked copies to run: `num_samples`, or 1 if all copies would be equal.

    An answer of one token is masked in every copy, and a causal model's copies have no masks. They
    differ only under a policy that uses random keys.
    """
    equal = cfg.causal or answer_length == 1
    return 1 if equal and not uses_keys(policy) else num_samples


@typed
def estimate_log_likelihood(
    model: Model,
    tokens: Int[ArrayLike, "*B T"],
    noisy: Int[ArrayLike, "B T"],
    p_mask: Float[ArrayLike, "B T"],
    cfg_scale: float = 0.0,
    *,
    prompt_len: int,
    policy: Policy | None = None,
    key: jax.Array | None = None,
    executor: Executor = "auto",
) -> float:
    """Estimates the log-likelihood in nats from given masked copies.

    Args:
      tokens: prompt and answer: one sequence, or one per copy.
      noisy: the copies, with [MASK] at some positions.
      p_mask: the probability with which each position was masked; read only at [MASK].
      prompt_len: tokens of the prompt, which guidance hides.

    Raises: InputError for copies and probabilities that do not fit the tokens.
    """
    check_policy(policy)
    _require_guidance(cfg_scale)
    copies = _given_copies(model.config, tokens, noisy, p_mask, prompt_len)
    count = len(copies[0])
    placed = model.place_sequences((*copies, sequence_keys(key, count)))
    (values, _), _ = model.run(
        score_noisy_program,
        *placed,
        policy,
        prompt_len=prompt_len,
        cfg_scale=cfg_scale,
        executor=executor,
    )
    return float(jnp.mean(values[:count]))


def _require_guidance(cfg_scale: float) -> None:
    require(cfg_scale >= 0, f"cfg_scale={cfg_scale} must not be negative")


def _given_copies(
    cfg: ModelConfig, tokens: ArrayLike, noisy: ArrayLike, p_mask: ArrayLike, prompt_len: int
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"], Float[np.ndarray, "B T"]]:
    """Checks the array arguments of `estimate_log_likelihood`, and repeats tokens per copy."""
    cfg.require_mask()
    noisy = as_ids(noisy, "noisy sequence")
    try:
        p_mask = np.asarray(p_mask, np.float32)
    except (OverflowError, TypeError, ValueError) as error:
        raise InputError("p_mask is no array of numbers; give one per token") from error
    check_shapes(cfg, noisy.shape, None)
    require(
        p_mask.shape == noisy.shape,
        f"p_mask has shape {p_mask.shape} and noisy {noisy.shape}; they must agree",
    )
    require(
        0 <= prompt_len < noisy.shape[1],
        f"prompt_len={prompt_len} leaves no answer in {noisy.shape[1]} tokens",
    )
    tokens = as_ids(tokens, "sequence")
    require(
        tokens.shape in (noisy.shape, noisy.shape[1:], (1, noisy.shape[1])),
        f"tokens have shape {tokens.shape} and noisy {noisy.shape}; give one sequence, or one per "
        "copy",
    )
    tokens = np.broadcast_to(tokens, noisy.shape)
    check_vocabulary(cfg, tokens, None, "sequence")
    masked = noisy == cfg.mask_id
    require(
        bool(((noisy == tokens) | masked).all()),
        "noisy differs from tokens where it is not [MASK]; give masked copies of tokens",
    )
    p = p_mask[:, prompt_len:][masked[:, prompt_len:]]
    require(bool(((p > 0) & (p <= 1)).all()), "p_mask must lie in (0, 1] where a token is masked")
    return tokens.astype(np.int32), noisy.astype(np.int32), p_mask


def score_pairs(
    model: Model,
    pairs: Pairs,
    keys: jax.Array,
    samples: Int[np.ndarray, "B"],
    *,
    stratum: int,
    cfg_scale: float = 0.0,
    policy: Policy | None = None,
    executor: Executor = "auto",
    fill_to: int = 1,
) -> tuple[CopyScores, Flops]:
    """Scores one masked copy of each pair; a pair may occur several times.

    Args:
      keys: one per pair; copies of a pair have the same key.
      samples: the number of each copy within its pair, from 0, or `WHOLE`. Key and number decide
        masks and random gates, whatever the batch and the order of requests.
      stratum: copies per round.
      fill_to: run the program for this batch size, or a multiple of it, also for fewer copies.
    """
    require(
        not (model.config.causal and cfg_scale > 0),
        f"cfg_scale={cfg_scale} hides the prompt behind [MASK], and a causal model has none; "
        "leave it out",
    )
    count = len(samples)
    pairs = align_pairs(model, pairs)
    placed = model.place_sequences((pairs, threefry_key(keys), np.asarray(samples)), fill_to)
    scores, seconds = model.run(
        score_pairs_program,
        *placed,
        policy,
        stratum=stratum,
        cfg_scale=cfg_scale,
        executor=executor,
    )
    host = sharding.to_host(scores)
    wanted = np.arange(host.gates.shape[-1]) % len(host.log_likelihood) < count
    scores = CopyScores(
        host.log_likelihood[:count],
        host.gates[:, wanted],
        host.masked_share[:count],
        host.is_greedy[:count],
    )
    flops = count_flops(
        model.config,
        scores.gates,
        num_tokens=pairs.tokens.shape[1],
        head_tokens=pairs.in_answer.shape[1],
        policy=policy,
        seconds=seconds,
    )
    return scores, flops


def draw_masked(
    key: jax.Array, sample: Int[Array, ""], in_answer: Bool[Array, "A"], stratum: int
) -> Bool[Array, "A"]:
    """Draws the masked positions of copy number `sample` of one answer.

    What is drawn does not depend on the padding before the answer.

    The copies of a round share one k ~ U{1..L}. Copy i masks round(k + i L / stratum) random
    positions, wrapped into 1..L. Halves are rounded to even, as in LLaDA's `get_log_likelihood`:
    if i L / stratum ends in a half (L = 8, 24, ... with 16 copies), even numbers of masked tokens
    are more frequent than odd ones. A stratum of 1 has no such bias. All of copy `WHOLE` is masked.

    Args:
      stratum: copies per round.
    """
    length = jnp.sum(in_answer)
    round_number, i = jnp.divmod(sample, stratum)
    round_key = jax.random.fold_in(key, round_number)
    k = jax.random.randint(round_key, (), 1, length + 1)
    count = jnp.round(k + i * (length / stratum)).astype(jnp.int32)
    count = jnp.where(sample == WHOLE, length, (count - 1) % length + 1)
    noise = jax.random.uniform(jax.random.fold_in(round_key, i + 1), in_answer.shape)
    is_token = jnp.arange(in_answer.size) < length  # the answer's tokens first, then padding
    order = jnp.argsort(jnp.where(is_token, noise, jnp.inf))
    return jnp.roll(jnp.argsort(order) < count, -length)


def answer_log_probs(
    cfg, params, tokens, valid, time, masked, in_answer, cfg_scale, policy, keys, executor
) -> tuple[Float[Array, "B A"], Bool[Array, "B A"], Bool[Array, "L R"]]:
    """Runs the model; returns log p of the answers' tokens where masked (0 elsewhere), whether each
    token is the most probable one, and gates.

    A causal model sees all tokens; "masked" are then those that count.

    Args:
      tokens: [B, T], prompts and answers.
      time: [B], the masked share of each answer.
      masked, in_answer: [B, A], of the last A positions: where tokens are replaced by [MASK], and
        where the answer is, from which guidance hides everything before.
      cfg_scale: above 0 the log-probabilities are guided, and R = 2 B.
    """
    first = tokens.shape[1] - masked.shape[1]
    answers, whole = tokens[:, first:], ((0, 0), (first, 0))
    if not cfg.causal:
        tokens = jnp.where(jnp.pad(masked, whole), cfg.mask_id, tokens)
    if cfg_scale > 0:
        tokens = with_unconditional(tokens, ~jnp.pad(in_answer, whole), cfg.mask_id)
        keys = jnp.concatenate([keys, jax.vmap(jax.random.fold_in, (0, None))(keys, 1)])
        valid, time = repeat_batch(valid), repeat_batch(time)
    out = transformer.run_layers(
        cfg, params, tokens, valid, policy, time=time, sequence_keys=keys, executor=executor
    )
    next_token = cfg.causal or cfg.right_shift
    h = (transformer.move_right(out.h, valid) if next_token else out.h)[:, first:]

    def log_probs(h, answers, masked):
        logits = transformer.head_logits(cfg, params, h, time)
        logits = guide(logits, cfg_scale) if cfg_scale > 0 else logits
        logits = transformer.apply_subs(cfg, logits)
        return masked_log_probs(logits, answers, masked), jnp.argmax(logits, axis=-1) == answers

    return *map_position_chunks(log_probs, ANSWER_CHUNK, h, answers, masked), out.gates


@timed_jit("cfg", "stratum", "cfg_scale", "executor")
def score_pairs_program(params, pairs, keys, samples, policy, *, cfg, stratum, cfg_scale, executor):
    """Masks one copy of each pair and estimates its log-likelihood; see `score_pairs`."""
    mask_keys, gate_keys = jax.vmap(jax.random.split)(keys).T
    draw = jax.vmap(draw_masked, (0, 0, 0, None))
    masked = pairs.in_answer if cfg.causal else draw(mask_keys, samples, pairs.in_answer, stratum)
    gate_keys = jax.vmap(jax.random.fold_in)(gate_keys, samples)
    share = jnp.sum(masked, axis=1) / jnp.sum(pairs.in_answer, axis=1)
    log_probs, is_best, gates = answer_log_probs(
        cfg, params, pairs.tokens, pairs.valid, share, masked, pairs.in_answer, cfg_scale, policy,
        gate_keys, executor,
    )  # fmt: skip
    is_greedy = jnp.all(is_best | ~masked, axis=1)
    return CopyScores(row_sum(log_probs) / share, gates, share, is_greedy)


@timed_jit("cfg", "prompt_len", "cfg_scale", "executor")
def score_noisy_program(
    params, tokens, noisy, p_mask, keys, policy, *, cfg, prompt_len, cfg_scale, executor
):
    """The estimate of each masked copy, and the gates; see `estimate_log_likelihood`."""
    masked, p_mask = noisy[:, prompt_len:] == cfg.mask_id, p_mask[:, prompt_len:]
    p_mask = jnp.where(masked, p_mask, 1.0)  # it may be 0 elsewhere
    time = row_sum(p_mask * masked) / jnp.maximum(jnp.sum(masked, axis=1), 1)
    tokens = jnp.concatenate([noisy[:, :prompt_len], tokens[:, prompt_len:]], axis=1)
    log_probs, _, gates = answer_log_probs(
        cfg, params, tokens, None, time, masked, jnp.ones_like(masked), cfg_scale, policy, keys,
        executor,
    )  # fmt: skip
    return row_sum(log_probs / p_mask), gates
