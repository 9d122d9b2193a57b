"""From documents to rows of equal length: two ways to pack, each with EOS after every document.

    stream   all documents one after the other, cut into rows; an incomplete last row is dropped
    mdlm     each thousand documents one after the other, cut into pieces of `length` - 2 tokens; a
             row is EOS, piece, EOS; an incomplete last row is dropped in each thousand

Source of `mdlm`: kuleshov-group/mdlm, dataloader.py, `_group_texts`. Each split begins a new
thousand. About half a row of some 1,100 is dropped per thousand documents.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Integer, UInt32

from dials_jax.data.encoding import EncodedPiece

BATCH_DOCUMENTS = 1000  # that `datasets.map` gives to the reference's packing at a time

PackedRows = Integer[np.ndarray, "n T"]
RowSums = UInt32[np.ndarray, "n"]


def token_dtype(*largest: int) -> np.dtype:
    """Returns the stored dtype for ids up to the `largest`: two bytes per token if they suffice."""
    return np.dtype("<u2" if max(largest) < 2**16 else "<u4")


def pack_stream(
    pieces: Sequence[EncodedPiece], rest: list[int], length: int, eos_id: int, dtype: np.dtype
) -> tuple[PackedRows, list[int]]:
    """Packs `rest` and the pieces. Returns the rows, and the tokens left for the next call.

    A document without text, which is only EOS, is left out. `eos_id` is not used.
    """
    texts = (piece.ids for piece in pieces if not piece.is_empty_document)
    return _cut_rows([rest, *texts], length, dtype)


def pack_mdlm(
    pieces: Sequence[EncodedPiece], rest: list[int], length: int, eos_id: int, dtype: np.dtype
) -> tuple[PackedRows, list[int]]:
    """Packs `rest` and the pieces. Returns the rows, and the tokens left for the next call.

    The caller drops what is left after each thousand documents.
    """
    texts, rest = _cut_rows([rest, *(piece.ids for piece in pieces)], length - 2, dtype)
    ends = np.full((len(texts), 1), eos_id, dtype)
    return np.concatenate([ends, texts, ends], axis=1), rest


def _cut_rows(
    documents: Sequence[list[int]], length: int, dtype: np.dtype
) -> tuple[PackedRows, list[int]]:
    """Concatenates the documents. Returns them as rows, and the tokens that do not fill a row."""
    tokens = np.fromiter(chain.from_iterable(documents), dtype)
    whole = len(tokens) // length * length
    return tokens[:whole].reshape(-1, length), tokens[whole:].tolist()


class Packing(NamedTuple):
    """A way to pack."""

    pack: Callable[
        [Sequence[EncodedPiece], list[int], int, int, np.dtype], tuple[PackedRows, list[int]]
    ]
    keeps_rest: bool  # from one thousand documents to the next


PACKINGS = {"mdlm": Packing(pack_mdlm, False), "stream": Packing(pack_stream, True)}


def write_rows(
    out: BinaryIO, batches: Iterable[Integer[np.ndarray, "_ T"]], length: int, dtype: np.dtype
) -> RowSums:
    """Writes rows batch by batch as one .npy file, and returns the sum of each.

    The bytes are those of `np.save` of all rows. numpy leaves room in the header for the first axis
    to grow, so the header can be overwritten at the end.
    """

    def write_header(num_rows: int) -> None:
        fields = {"descr": dtype.str, "fortran_order": False, "shape": (num_rows, length)}
        np.lib.format.write_array_header_1_0(out, fields)

    write_header(0)
    sums = [np.zeros(0, "<u4")]
    for rows in batches:
        out.write(rows.tobytes())
        sums.append(row_sums(rows))
    out.seek(0)
    write_header(sum(map(len, sums)))
    return np.concatenate(sums)


def row_sums(rows: PackedRows) -> RowSums:
    """A checksum (CRC-32) of each row, by which damage shows when the row is read."""
    return np.array([zlib.crc32(row.tobytes()) for row in rows], "<u4")
