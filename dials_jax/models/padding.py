"""Sequences of mixed lengths as arrays of one length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from dials_jax.errors import require
from dials_jax.nn.kernels.hopper_attention import TILE


def pad_prompts(
    prompts: Sequence[Sequence[int] | Int[np.ndarray, "_"]], length: int, pad_id: int
) -> tuple[Int[np.ndarray, "B P"], Bool[np.ndarray, "B P"]]:
    """Pads prompts on the left to `length`: (tokens, valid).

    Tokens have 64 bits: in fewer, an id that is too large would become another one unseen.

    Raises: InputError if a prompt is longer.
    """
    tokens = np.full((len(prompts), length), pad_id, np.int64)
    valid = np.zeros((len(prompts), length), bool)
    for i, ids in enumerate(prompts):
        require(len(ids) <= length, f"prompt {i} has {len(ids)} tokens; at most {length} fit")
        tokens[i, length - len(ids) :] = ids
        valid[i, length - len(ids) :] = True
    return tokens, valid


def aligned(
    tokens: Int[np.ndarray, "B T"],
    valid: Bool[np.ndarray, "B T"] | None,
    pad_id: int,
    multiple: int = TILE,
) -> tuple[Int[np.ndarray, "B _"], Bool[np.ndarray, "B _"] | None]:
    """Pads on the left until the end is where a tile of keys ends.

    A sequence's keys then fall into the same tiles in batches of every length, so that their sums
    have the same order: the batch-invariant mode needs that.
    """
    extra = ((0, 0), (-tokens.shape[1] % multiple, 0))
    if extra[1][0] == 0:
        return tokens, valid
    valid = np.ones(tokens.shape, bool) if valid is None else valid
    return np.pad(tokens, extra, constant_values=pad_id), np.pad(valid, extra)


def differ_in_length(sequences: Any) -> bool:
    """Whether these are lists or arrays of several lengths, which make no array as they are."""
    if not isinstance(sequences, list | tuple) or not all(np.ndim(ids) == 1 for ids in sequences):
        return False
    return len({len(ids) for ids in sequences}) > 1
