"""From documents to rows of equal length: two ways to pack, each with EOS after every document.

    stream   all documents in a line, cut into rows; what does not fill the last row is dropped
    mdlm     a thousand documents at a time: in a line, cut to `length` - 2, every piece between two
             EOS tokens; what does not fill a row is dropped at each thousand

Source of `mdlm`: kuleshov-group/mdlm, dataloader.py, `_group_texts`. Its map batches start again in
every split. It drops about half a row of some 1,100 per batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Integer

from dials_jax.data.encoding import EncodedPiece

BATCH_DOCUMENTS = 1000  # what `datasets.map` hands to the reference's packing at a time

PackedRows = Integer[np.ndarray, "n T"]


def token_dtype(*largest: int) -> np.dtype:
    """Two bytes per token where they suffice."""
    return np.dtype("<u2" if max(largest) < 2**16 else "<u4")


def pack_stream(
    pieces: Sequence[EncodedPiece], rest: list[int], length: int, eos_id: int, dtype: np.dtype
) -> tuple[PackedRows, list[int]]:
    """Rows of the tokens of `rest` and the documents, and the tokens left for the next call.

    A document that is only EOS is left out.
    """
    return _cut([rest, *(piece.ids for piece in pieces if not piece.empty)], length, dtype)


def pack_mdlm(
    pieces: Sequence[EncodedPiece], rest: list[int], length: int, eos_id: int, dtype: np.dtype
) -> tuple[PackedRows, list[int]]:
    """Rows of a part of a thousand documents, and the tokens left for the next part."""
    texts, rest = _cut([rest, *(piece.ids for piece in pieces)], length - 2, dtype)
    ends = np.full((len(texts), 1), eos_id, dtype)
    return np.concatenate([ends, texts, ends], axis=1), rest


def _cut(
    documents: Sequence[list[int]], length: int, dtype: np.dtype
) -> tuple[PackedRows, list[int]]:
    tokens = np.fromiter(chain.from_iterable(documents), dtype)
    whole = len(tokens) // length * length
    return tokens[:whole].reshape(-1, length), tokens[whole:].tolist()


class Packing(NamedTuple):
    rows: Callable[
        [Sequence[EncodedPiece], list[int], int, int, np.dtype], tuple[PackedRows, list[int]]
    ]
    keeps_rest: bool  # from one thousand documents to the next


PACKINGS = {"mdlm": Packing(pack_mdlm, False), "stream": Packing(pack_stream, True)}


def write_rows(
    out: BinaryIO, batches: Iterable[Integer[np.ndarray, "_ T"]], length: int, dtype: np.dtype
) -> int:
    """Writes rows batch by batch, with the bytes of `np.save` of all; returns their number.

    numpy leaves room in the header for the first axis to grow, so it can be written again.
    """

    def write_header(num_rows: int) -> None:
        fields = {"descr": dtype.str, "fortran_order": False, "shape": (num_rows, length)}
        np.lib.format.write_array_header_1_0(out, fields)

    write_header(0)
    num_rows = 0
    for rows in batches:
        out.write(rows.tobytes())
        num_rows += len(rows)
    out.seek(0)
    write_header(num_rows)
    return num_rows
