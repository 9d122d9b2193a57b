"""Monte-Carlo likelihood of an answer given a prompt, as LLaDA evaluates it.

Source: `get_log_likelihood.py` and `eval_llada.py` of ML-GSAI/LLaDA. An estimate averages
-CE / p over masked copies of the answer, where p is the share that a copy really masks. The
copies of a round are stratified: their numbers of masks are spread evenly over 1..L.
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
from dials_jax.config import ModelConfig, shown, typed
from dials_jax.diffusion.guidance import guide, repeat_batch, with_unconditional
from dials_jax.diffusion.objectives import masked_log_probs
from dials_jax.errors import InputError, require
from dials_jax.evaluation.positions import over_positions
from dials_jax.keys import threefry_key
from dials_jax.models import transformer
from dials_jax.models.model import Model, as_ids, check_shapes, check_vocabulary, sequence_keys
from dials_jax.nn.policy import Policy, check_policy, uses_keys
from dials_jax.nn.stack import Executor
from dials_jax.skipping.flops import Flops, count_flops

ANSWER_CHUNK = 128  # of the answer, scored together; bounds the memory that logits take


class Pairs(NamedTuple):
    """Prompts padded on the left and answers padded on the right, so that answers line up."""

    prompts: Int[ArrayLike, "B P"]
    answers: Int[ArrayLike, "B A"]
    prompt_valid: Bool[ArrayLike, "B P"]
    answer_valid: Bool[ArrayLike, "B A"]


class CopyScores(NamedTuple):
    """One entry per masked copy: its estimate of the log-likelihood in nats."""

    log_likelihood: Float[Array, "R"]
    gates: Bool[Array, "L R"]
    masked_share: Float[Array, "R"]  # masked share of the answer


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
    """log p(answer | prompt) in nats, a lower bound in expectation.

    Args:
      num_samples: masked copies; a multiple of `batch_size`. If all would be equal, as for an
        answer of one token, one is run (see `num_copies`).
      batch_size: copies per round, over which the numbers of masks are stratified.
      key: from `jax.random.key`; None: that of seed 0.
    """
    model.config.require_mask()
    check_policy(policy)
    _require_guidance(cfg_scale)
    require(batch_size > 0, f"batch_size={batch_size} must be positive")
    require(
        num_samples > 0 and num_samples % batch_size == 0,
        f"num_samples={num_samples} must be a multiple of batch_size={batch_size}",
    )
    pairs = pad_pairs([(prompt_ids, answer_ids)], model.config)
    num_samples = num_copies(len(answer_ids), num_samples, policy)
    num_rows = min(batch_size, num_samples)
    rows = jax.tree.map(lambda x: np.repeat(x, num_rows, axis=0), pairs)
    keys = jnp.broadcast_to(sequence_keys(key, 1), (num_rows,))
    estimates = []
    for first in range(0, num_samples, num_rows):
        samples = np.arange(first, first + num_rows)
        scores, _ = score_pairs(
            model, rows, keys, samples, stratum=batch_size, cfg_scale=cfg_scale, policy=policy
        )
        estimates.append(np.mean(scores.log_likelihood))
    return float(np.mean(estimates))


def num_copies(answer_length: int, num_samples: int, policy: Policy | None) -> int:
    """How many of `num_samples` masked copies to run for their mean.

    An answer of one token is masked in every copy. Copies differ only under a
    policy that uses random keys.
    """
    return 1 if answer_length == 1 and not uses_keys(policy) else num_samples


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
    """The estimate in nats from given masked copies.

    Args:
      tokens: prompt and answer, one sequence or one per copy.
      noisy: the copies, with [MASK] at some positions.
      p_mask: the probability with which each position was masked; read only at [MASK].
      prompt_len: tokens of the prompt, which guidance hides.

    Raises: InputError for copies and probabilities that do not fit the tokens.
    """
    check_policy(policy)
    _require_guidance(cfg_scale)
    copies = _given_copies(model.config, tokens, noisy, p_mask, prompt_len)
    num_rows = len(copies[0])
    rows = model.place_sequences((*copies, sequence_keys(key, num_rows)))
    (values, _), _ = model.run(
        score_noisy_program,
        *rows,
        policy,
        prompt_len=prompt_len,
        cfg_scale=cfg_scale,
        executor=executor,
    )
    return float(jnp.mean(values[:num_rows]))


def _require_guidance(cfg_scale: float) -> None:
    require(cfg_scale >= 0, f"cfg_scale={cfg_scale} must not be negative")


def _given_copies(
    cfg: ModelConfig, tokens: ArrayLike, noisy: ArrayLike, p_mask: ArrayLike, prompt_len: int
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"], Float[np.ndarray, "B T"]]:
    """The array arguments of `estimate_log_likelihood`, checked, with one entry per copy."""
    cfg.require_mask()
    noisy = as_ids(noisy, "noisy sequence")
    try:
        p_mask = np.asarray(p_mask, np.float32)
    except (TypeError, ValueError) as error:
        raise InputError("p_mask is no array of numbers; give one a token") from error
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
        f"tokens have shape {tokens.shape} and noisy {noisy.shape}; give one row, or one a copy",
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
    """Scores one masked copy of each pair.

    Args:
      keys: one per pair; copies of one pair share it.
      samples: which copy of its pair each one is, from 0. With the key it decides masks and random
        gates, in any batch and order of requests.
      stratum: copies per round.
      fill_to: run the program of this batch size, or of a multiple, also for fewer copies.
    """
    num_rows = len(samples)
    rows = model.place_sequences((pairs, threefry_key(keys), np.asarray(samples)), fill_to)
    scores, seconds = model.run(
        score_pairs_program, *rows, policy, stratum=stratum, cfg_scale=cfg_scale, executor=executor
    )
    host = sharding.to_host(scores)
    keep = np.arange(host.gates.shape[-1]) % len(host.log_likelihood) < num_rows
    scores = CopyScores(
        host.log_likelihood[:num_rows], host.gates[:, keep], host.masked_share[:num_rows]
    )
    flops = count_flops(
        model.config,
        scores.gates,
        num_tokens=pairs.prompts.shape[1] + pairs.answers.shape[1],
        head_tokens=pairs.answers.shape[1],
        policy=policy,
        seconds=seconds,
    )
    return scores, flops


@typed
def pad_pairs(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    cfg: ModelConfig,
    prompt_length: int = 0,
    answer_length: int = 0,
) -> Pairs:
    """Pads to common lengths, at least those given.

    Raises: InputError for an empty answer, [MASK] or an unknown token in a pair, anything but
      integers, or more tokens than positions.
    """
    require(isinstance(pairs, list | tuple), f"pairs={shown(pairs)} is no list of pairs")
    pairs = [_as_pair(pair, i) for i, pair in enumerate(pairs)]
    for length in (prompt_length, answer_length):
        require(
            length <= cfg.max_length, f"{length} tokens are more than {cfg.max_length} positions"
        )
    prompt_length = max([prompt_length, *(len(p) for p, _ in pairs)])
    answer_length = max([answer_length, *(len(a) for _, a in pairs)])
    out = Pairs(
        np.full((len(pairs), prompt_length), cfg.pad_id),
        np.full((len(pairs), answer_length), cfg.pad_id),
        np.zeros((len(pairs), prompt_length), bool),
        np.zeros((len(pairs), answer_length), bool),
    )
    for i, (prompt, answer) in enumerate(pairs):
        require(len(answer) > 0, f"pair {i}: the answer is empty")
        if (prompt == cfg.mask_id).any() or (answer == cfg.mask_id).any():
            raise InputError(f"pair {i} contains [MASK] (id {cfg.mask_id}); remove it")
        total = len(prompt) + len(answer)
        require(total <= cfg.max_length, f"pair {i}: {total} tokens for {cfg.max_length} positions")
        out.prompts[i, prompt_length - len(prompt) :] = prompt
        out.prompt_valid[i, prompt_length - len(prompt) :] = True
        out.answers[i, : len(answer)] = answer
        out.answer_valid[i, : len(answer)] = True
    tokens = np.concatenate([out.prompts, out.answers], axis=1)
    present = np.concatenate([out.prompt_valid, out.answer_valid], axis=1)
    check_vocabulary(cfg, tokens, present, "pair")
    return out._replace(prompts=out.prompts.astype(np.int32), answers=out.answers.astype(np.int32))


def _as_pair(pair: object, i: int) -> tuple[np.ndarray, np.ndarray]:
    two = isinstance(pair, tuple | list) and len(pair) == 2
    require(two, f"pair {i} is {shown(pair)}; give the token ids of a prompt and of an answer")
    prompt, answer = (
        as_ids(ids, f"pair {i}: {part}")
        for ids, part in zip(pair, ("prompt id", "answer id"), strict=True)
    )
    require(
        prompt.ndim == answer.ndim == 1,
        f"pair {i} has shapes {prompt.shape} and {answer.shape}; give one row of ids each",
    )
    return prompt, answer


def draw_masked(
    key: jax.Array, sample: Int[Array, ""], answer_valid: Bool[Array, "A"], stratum: int
) -> Bool[Array, "A"]:
    """The masked positions of copy number `sample` of one answer.

    A round of `stratum` copies shares one k ~ U{1..L}; its copy i masks round(k + i L / stratum)
    random positions, wrapped into 1..L. Halves are rounded to even, as in LLaDA's
    `get_log_likelihood`: if i L / stratum ends in a half (L = 8, 24, ... with 16 copies),
    even numbers are masked more often than odd ones. A stratum of 1 has no such bias.
    """
    length = jnp.sum(answer_valid)
    turn, i = jnp.divmod(sample, stratum)
    round_key = jax.random.fold_in(key, turn)
    k = jax.random.randint(round_key, (), 1, length + 1)
    count = jnp.round(k + i * (length / stratum)).astype(jnp.int32)
    count = (count - 1) % length + 1
    noise = jax.random.uniform(jax.random.fold_in(round_key, i + 1), answer_valid.shape)
    order = jnp.argsort(jnp.where(answer_valid, noise, jnp.inf))
    return jnp.argsort(order) < count


def answer_log_probs(
    cfg, params, tokens, valid, time, answers, masked, cfg_scale, policy, keys, executor
) -> tuple[Float[Array, "B A"], Bool[Array, "L R"]]:
    """log p of the answers' tokens where masked, guided if `cfg_scale` is above 0, and the gates.

    Args:
      tokens: prompts and answers, with [MASK] at some positions.
      time: the masked share of each answer.
    """
    prompt_len = tokens.shape[1] - answers.shape[1]
    if cfg_scale > 0:
        in_prompt = jnp.arange(tokens.shape[1]) < prompt_len
        tokens = with_unconditional(tokens, in_prompt, cfg.mask_id)
        keys = jnp.concatenate([keys, jax.vmap(jax.random.fold_in, (0, None))(keys, 1)])
        valid, time = repeat_batch(valid), repeat_batch(time)
    out = transformer.run_layers(
        cfg, params, tokens, valid, policy, time=time, sequence_keys=keys, executor=executor
    )
    h = transformer.shift_to_predicted(cfg, out.h, valid)[:, prompt_len:]

    def log_probs(h, answers, masked):
        logits = transformer.head_logits(cfg, params, h, time)
        logits = guide(logits, cfg_scale) if cfg_scale > 0 else logits
        return masked_log_probs(transformer.apply_subs(cfg, logits), answers, masked)

    return over_positions(log_probs, ANSWER_CHUNK, h, answers, masked), out.gates


@timed_jit("cfg", "stratum", "cfg_scale", "executor")
def score_pairs_program(params, pairs, keys, samples, policy, *, cfg, stratum, cfg_scale, executor):
    draw = jax.vmap(lambda key, sample, valid: draw_masked(key, sample, valid, stratum))
    mask_keys, gate_keys = jax.vmap(jax.random.split)(keys).T
    masked = draw(mask_keys, samples, pairs.answer_valid)
    tokens = jnp.concatenate([pairs.prompts, jnp.where(masked, cfg.mask_id, pairs.answers)], axis=1)
    valid = jnp.concatenate([pairs.prompt_valid, pairs.answer_valid], axis=1)
    gate_keys = jax.vmap(jax.random.fold_in)(gate_keys, samples)
    share = jnp.sum(masked, axis=1) / jnp.sum(pairs.answer_valid, axis=1)
    log_probs, gates = answer_log_probs(
        cfg, params, tokens, valid, share, pairs.answers, masked, cfg_scale, policy, gate_keys,
        executor,
    )  # fmt: skip
    return CopyScores(jnp.sum(log_probs, axis=1) / share, gates, share)


@timed_jit("cfg", "prompt_len", "cfg_scale", "executor")
def score_noisy_program(
    params, tokens, noisy, p_mask, keys, policy, *, cfg, prompt_len, cfg_scale, executor
):
    masked, p_mask = noisy[:, prompt_len:] == cfg.mask_id, p_mask[:, prompt_len:]
    p_mask = jnp.where(masked, p_mask, 1.0)  # it may be 0 elsewhere
    time = jnp.sum(p_mask * masked, axis=1) / jnp.maximum(jnp.sum(masked, axis=1), 1)
    log_probs, gates = answer_log_probs(
        cfg, params, noisy, None, time, tokens[:, prompt_len:], masked, cfg_scale, policy, keys,
        executor,
    )  # fmt: skip
    return jnp.sum(log_probs / p_mask, axis=1), gates
