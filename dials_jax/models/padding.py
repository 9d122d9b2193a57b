"""Sequences of mixed lengths as arrays of one length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from dials_jax.errors import require


def pad_prompts(
    prompts: Sequence[Sequence[int] | Int[np.ndarray, "_"]], length: int, pad_id: int
) -> tuple[Int[np.ndarray, "B P"], Bool[np.ndarray, "B P"]]:
    """Pads prompts on the left to `length`: (tokens int32, valid).

    Raises: InputError if a prompt is longer.
    """
    tokens = np.full((len(prompts), length), pad_id, np.int32)
    valid = np.zeros((len(prompts), length), bool)
    for i, ids in enumerate(prompts):
        require(len(ids) <= length, f"prompt {i} has {len(ids)} tokens; at most {length} fit")
        tokens[i, length - len(ids) :] = ids
        valid[i, length - len(ids) :] = True
    return tokens, valid


def differ_in_length(sequences: Any) -> bool:
    """Whether these are lists or arrays of several lengths, which make no array as they are."""
    if not isinstance(sequences, list | tuple) or not all(np.ndim(ids) == 1 for ids in sequences):
        return False
    return len({len(ids) for ids in sequences}) > 1
