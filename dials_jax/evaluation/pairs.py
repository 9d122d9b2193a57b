"""Pairs of a prompt and an answer as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Bool, Int

from dials_jax.config import ModelConfig, shown, typed
from dials_jax.data.tasks import Pair
from dials_jax.errors import InputError, require
from dials_jax.models.model import Model, as_ids, check_vocabulary
from dials_jax.models.padding import aligned


class Pairs(NamedTuple):
    """Pairs padded on the left, so that all end together and only their sum of lengths matters.

    Attributes:
      tokens, valid: prompt and answer; `valid` is False at padding.
      in_answer: of the last A positions, those of the answer. Before it the prompt ends.
    """

    tokens: Int[ArrayLike, "B T"]
    valid: Bool[ArrayLike, "B T"]
    in_answer: Bool[ArrayLike, "B A"]


ArrayPair = tuple[Int[np.ndarray, "prompt"], Int[np.ndarray, "answer"]]


@typed
def pad_pairs(
    pairs: Sequence[Pair],
    cfg: ModelConfig,
    length: int = 0,
    answer_length: int = 0,
) -> Pairs:
    """Pads pairs to a common length T, and answers to A; both at least those given.

    Raises: InputError for an empty answer, a causal model's empty prompt, [MASK] or an unknown
      token in a pair, anything but integers, or more tokens than the model has positions.
    """
    arrays = check_pairs(pairs, cfg)
    for given in (length, answer_length):
        require(
            0 <= given <= cfg.max_length,
            f"{given} tokens are not in 0 to {cfg.max_length}, the model's positions",
        )
    return pad_arrays(arrays, cfg, length, answer_length)


def pad_arrays(
    pairs: Sequence[ArrayPair], cfg: ModelConfig, length: int, answer_length: int
) -> Pairs:
    """`pad_pairs` of what `check_pairs` returns."""
    answer_length = max([answer_length, *(len(answer) for _, answer in pairs)])
    length = max([length, answer_length, *(len(prompt) + len(answer) for prompt, answer in pairs)])
    tokens = np.full((len(pairs), length), cfg.pad_id)
    valid, in_answer = np.zeros(tokens.shape, bool), np.zeros((len(pairs), answer_length), bool)
    for i, (prompt, answer) in enumerate(pairs):
        start, middle = length - len(prompt) - len(answer), length - len(answer)
        tokens[i, start:middle], tokens[i, middle:] = prompt, answer
        valid[i, start:] = True
        in_answer[i, answer_length - len(answer) :] = True
    return Pairs(tokens.astype(np.int32), valid, in_answer)


def check_pairs(pairs: Sequence[Pair], cfg: ModelConfig) -> list[ArrayPair]:
    """The pairs as arrays. Raises: as `pad_pairs`, naming the first that cannot be scored."""
    if not isinstance(pairs, list | tuple):
        raise InputError(f"pairs={shown(pairs)} is no list of pairs")
    arrays = [_as_pair(pair, i) for i, pair in enumerate(pairs)]
    for i, (prompt, answer) in enumerate(arrays):
        _check_pair(cfg, i, prompt, answer)
    return arrays


def align_pairs(model: Model, pairs: Pairs) -> Pairs:
    """As `padding.aligned` does, for a batch-invariant model; for any other as they are."""
    if not model.batch_invariant:
        return pairs
    tokens, valid = aligned(pairs.tokens, pairs.valid, model.config.pad_id)
    return pairs._replace(tokens=tokens, valid=valid)


def _check_pair(cfg: ModelConfig, i: int, prompt: np.ndarray, answer: np.ndarray) -> None:
    require(len(answer) > 0, f"pair {i}: the answer is empty")
    require(
        not (prompt == cfg.mask_id).any() and not (answer == cfg.mask_id).any(),
        f"pair {i} contains [MASK] (id {cfg.mask_id}); remove it",
    )
    require(
        len(prompt) > 0 or not cfg.causal,
        f"pair {i}: nothing predicts a causal model's first token; give a prompt, such as the end "
        "of text",
    )
    for ids in (prompt, answer):
        check_vocabulary(cfg, ids[None], None, "pair", [i])
    total = len(prompt) + len(answer)
    require(total <= cfg.max_length, f"pair {i}: {total} tokens for {cfg.max_length} positions")


def _as_pair(pair: object, i: int) -> ArrayPair:
    if not (isinstance(pair, tuple | list) and len(pair) == 2):  # to show one takes long
        raise InputError(
            f"pair {i} is {shown(pair)}; give the token ids of a prompt and of an answer"
        )
    prompt, answer = (
        as_ids(ids, f"pair {i}: {part}")
        for ids, part in zip(pair, ("prompt id", "answer id"), strict=True)
    )
    require(
        prompt.ndim == answer.ndim == 1,
        f"pair {i} has shapes {prompt.shape} and {answer.shape}; give one row of ids each",
    )
    return prompt, answer
