"""Pairs of a prompt and an answer as arrays, padded so that all answers start at one position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Bool, Int

from dials_jax.config import ModelConfig, shown, typed
from dials_jax.errors import require
from dials_jax.models.model import as_ids, check_vocabulary


class Pairs(NamedTuple):
    """Prompts padded on the left, and answers padded on the right."""

    prompts: Int[ArrayLike, "B P"]
    answers: Int[ArrayLike, "B A"]
    prompt_valid: Bool[ArrayLike, "B P"]
    answer_valid: Bool[ArrayLike, "B A"]


@typed
def pad_pairs(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    cfg: ModelConfig,
    prompt_length: int = 0,
    answer_length: int = 0,
) -> Pairs:
    """Pads prompts and answers to common lengths, at least those given.

    Raises: InputError for an empty answer, [MASK] or an unknown token in a pair, anything but
      integers, or more tokens than the model has positions.
    """
    require(isinstance(pairs, list | tuple), f"pairs={shown(pairs)} is no list of pairs")
    pairs = [_as_pair(pair, i) for i, pair in enumerate(pairs)]
    for length in (prompt_length, answer_length):
        require(
            length <= cfg.max_length, f"{length} tokens are more than {cfg.max_length} positions"
        )
    for i, (prompt, answer) in enumerate(pairs):
        _check_pair(cfg, i, prompt, answer)
    prompt_length = max([prompt_length, *(len(prompt) for prompt, _ in pairs)])
    answer_length = max([answer_length, *(len(answer) for _, answer in pairs)])
    tokens = np.full((len(pairs), prompt_length + answer_length), cfg.pad_id)
    valid = np.zeros(tokens.shape, bool)
    for i, (prompt, answer) in enumerate(pairs):
        start, end = prompt_length - len(prompt), prompt_length + len(answer)
        tokens[i, start:prompt_length] = prompt
        tokens[i, prompt_length:end] = answer
        valid[i, start:end] = True
    check_vocabulary(cfg, tokens, valid, "pair")
    prompts, answers = np.split(tokens.astype(np.int32), [prompt_length], axis=1)
    return Pairs(prompts, answers, *np.split(valid, [prompt_length], axis=1))


def _check_pair(cfg: ModelConfig, i: int, prompt: np.ndarray, answer: np.ndarray) -> None:
    require(len(answer) > 0, f"pair {i}: the answer is empty")
    require(
        not (prompt == cfg.mask_id).any() and not (answer == cfg.mask_id).any(),
        f"pair {i} contains [MASK] (id {cfg.mask_id}); remove it",
    )
    total = len(prompt) + len(answer)
    require(total <= cfg.max_length, f"pair {i}: {total} tokens for {cfg.max_length} positions")


def _as_pair(pair: object, i: int) -> tuple[Int[np.ndarray, "prompt"], Int[np.ndarray, "answer"]]:
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
