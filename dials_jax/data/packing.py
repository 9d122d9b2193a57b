"""From documents to rows of equal length: two ways to pack, each with EOS after every document.

    stream   everything end to end, cut into rows; what does not fill the last row is dropped
    mdlm     a thousand documents at a time: end to end, cut to `length` - 2, every piece between
             two EOS tokens, and what does not fill a row dropped at each thousand

Source of `mdlm`: kuleshov-group/mdlm, dataloader.py, `_group_texts`. Its map batches begin anew in
every split. It drops about half a row of some 1,100 a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
from jaxtyping import Integer

from dials_jax.config import require
from dials_jax.data.tokenizer import Tokenizer

BATCH_DOCUMENTS = 1000  # what `datasets.map` hands to the reference's packing at a time

Rows = Integer[np.ndarray, "n T"]


def token_dtype(*largest: int) -> np.dtype:
    """Two bytes a token where they suffice."""
    return np.dtype("<u2" if max(largest) < 2**16 else "<u4")


def encode_documents(
    documents: Sequence[tuple[str, str]], plain: Tokenizer, eos_id: int, mask_id: int | None
) -> list[list[int]]:
    """Tokens and EOS of every (where, text).

    Args:
      plain: `Tokenizer.plain()`, so that names of special tokens are ordinary text.

    Raises: InputError, naming the document, if it contains the mask token.
    """
    encoded = plain.encode_batch([text for _, text in documents])
    for (where, _), ids in zip(documents, encoded, strict=True):
        require(
            mask_id is None or mask_id not in ids, f"{where}: contains the mask token; remove it"
        )
        ids.append(eos_id)
    return encoded


def stream_rows(
    documents: Sequence[list[int]], rest: list[int], length: int, dtype: np.dtype
) -> tuple[Rows, list[int]]:
    """Rows of what `rest` and the documents hold, and the tokens that wait for the next call.

    A document of nothing but EOS is left out.
    """
    return _cut([rest, *(ids for ids in documents if len(ids) > 1)], length, dtype)


def mdlm_rows(
    documents: Sequence[list[int]], rest: list[int], length: int, dtype: np.dtype
) -> tuple[Rows, list[int]]:
    """Rows of one batch of documents, none waiting: see the top of the file."""
    assert not rest and len(documents) <= BATCH_DOCUMENTS
    pieces, _ = _cut(documents, length - 2, dtype)
    if not len(pieces):
        return np.empty((0, length), dtype), []
    ends = np.full((len(pieces), 1), documents[0][-1], dtype)
    return np.concatenate([ends, pieces, ends], axis=1), []


def _cut(documents: Sequence[list[int]], length: int, dtype: np.dtype) -> tuple[Rows, list[int]]:
    tokens = np.fromiter(chain.from_iterable(documents), dtype)
    whole = len(tokens) // length * length
    return tokens[:whole].reshape(-1, length), tokens[whole:].tolist()


PACKINGS = {"mdlm": mdlm_rows, "stream": stream_rows}
