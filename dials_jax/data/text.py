"""Documents tokenised once, packed into rows one after the other, and then read from disk.

The packed rows are an ordinary .npy file in `TextData.cache`. Its name is a fingerprint of the
files' contents, the tokenizer and the row length, so the text is packed again after a change of any
of them. The .json beside it holds a digest; rows that were damaged are packed again, too.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import re
import uuid
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, Integer

from dials_jax.config import TextData
from dials_jax.data.batches import Batch, Indices, RowArrays, random_generator
from dials_jax.data.encoding import EncodedPiece, encode_documents
from dials_jax.data.packing import PackedRows, pack_stream, token_dtype, write_rows
from dials_jax.data.records import (
    JSON_LINES_SUFFIXES,
    TEXT_SUFFIXES,
    content_sha256,
    expand_paths,
    file_sha256,
    prefix_errors,
    read_documents,
)
from dials_jax.data.tokenizer import Tokenizer, check_token_ids, load_tokenizer
from dials_jax.errors import InputError, require
from dials_jax.files import local_path, read_json, write_json

UNFINISHED_SUFFIX = ".part"


@runtime_checkable
class RowStore(Protocol):
    """Rows on disk: the part of a NumPy array's interface that `PackedText` needs."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: Int[np.ndarray, "B"]) -> Integer[np.ndarray, "B T"]: ...


@dataclass(frozen=True, eq=False)
class PackedText:
    """Rows of packed text (a TrainingData). The first `prompt_length` tokens are never masked."""

    tokens: RowStore  # [num_rows, length], on disk
    fingerprint: str
    prompt_length: int
    random_length_prob: float
    fill_id: int  # the token after a random length; never valid
    vocab_size: int  # of the tokenizer

    @property
    def num_rows(self) -> int:
        return len(self.tokens)

    def rows(self, indices: Indices) -> RowArrays:
        """Returns (tokens, answer, None). Raises: InputError for a token not in the vocabulary."""
        stored = self.tokens[np.asarray(indices)]
        largest = stored.max(initial=0)
        if largest >= self.vocab_size:
            raise InputError(
                f"packed rows hold token {largest}, but the tokenizer has {self.vocab_size} ids; "
                "they are damaged or of another tokenizer: delete and pack them again"
            )
        tokens = np.asarray(stored, np.int32)
        answer = np.broadcast_to(np.arange(tokens.shape[1]) >= self.prompt_length, tokens.shape)
        return tokens, answer.copy(), None

    def finish_batch(self, batch: Batch, seed: int, step: int) -> Batch:
        """With probability `random_length_prob`, cuts all sequences to one random length.

        The length is uniform on {prompt_length + 1, ..., T}. The shape stays; positions beyond the
        length are not valid. So the model learns to work with short inputs.

        Source: LLaDA, appendix B.1.
        """
        random = random_generator("random length", seed, step)
        if random.random() >= self.random_length_prob:
            return batch
        num_tokens = batch.tokens.shape[1]
        keep = np.arange(num_tokens) < random.integers(self.prompt_length + 1, num_tokens + 1)
        return batch._replace(
            tokens=np.where(keep, batch.tokens, np.int32(self.fill_id)),
            answer=batch.answer & keep,
            valid=np.broadcast_to(keep, batch.tokens.shape).copy(),
        )


def pack_text(
    cfg: TextData, eos_id: int, mask_id: int | None, tokenizer: Tokenizer | None = None
) -> PackedText:
    """Packs the documents of `cfg.paths`, unless the cache holds them already, and opens the rows.

    A .txt file is one document. Every document ends with EOS. An incomplete last row is dropped.
    Names of added tokens inside a document are ordinary text.

    Args:
      tokenizer: None: the one at `cfg.tokenizer`.

    Raises: InputError for bad settings, an unreadable line, or text too short for one row.
    """
    require(
        0 <= cfg.prompt_length < cfg.length,
        f"prompt_length={cfg.prompt_length} must lie in [0, length={cfg.length})",
    )
    files = expand_paths(cfg.paths, TEXT_SUFFIXES + JSON_LINES_SUFFIXES)
    tokenizer = tokenizer or load_tokenizer(cfg.tokenizer)
    check_token_ids(tokenizer, mask_id, eos_id)
    packed, is_there = _find_packed(cfg, files, tokenizer, eos_id)
    if is_there:
        _check_spelling(files, tokenizer)
    else:
        _pack(files, tokenizer, eos_id, mask_id, cfg.length, packed)
    return PackedText(
        tokens=np.load(packed, mmap_mode="r"),
        fingerprint=packed.stem,
        prompt_length=cfg.prompt_length,
        random_length_prob=cfg.random_length_prob,
        fill_id=eos_id,
        vocab_size=tokenizer.vocab_size,
    )


def packed_summary(cfg: TextData, data: PackedText) -> dict[str, Any]:
    """Reads the counts (documents, tokens, rows), source files and tokenizer of packed text."""
    return read_json(local_path(cfg.cache, "cache") / f"{data.fingerprint}.json")


def _find_packed(
    cfg: TextData, files: list[Path], tokenizer: Tokenizer, eos_id: int
) -> tuple[Path, bool]:
    """Returns the path of the packed rows, and whether they exist.

    Rows that version 0.1 packed are used if their ids are right; otherwise there is a warning.
    """
    contents = [[path.name, path.stat().st_size, content_sha256(path)] for path in files]

    def path_for(fingerprint: str) -> Path:
        digest = hashlib.sha256(json.dumps([fingerprint, eos_id, cfg.length]).encode())
        for content in contents:
            digest.update(json.dumps(content).encode())
        return local_path(cfg.cache, "cache") / f"{digest.hexdigest()[:16]}.npy"

    current, *earlier = map(path_for, tokenizer.fingerprints)
    if _is_intact(current):
        return current, True
    wrong = [path_for(tokenizer.misread)] if tokenizer.misread else []
    named_ids = tokenizer.named_token_ids(but=eos_id)
    for packed in filter(_is_intact, earlier):
        if not np.isin(np.load(packed, mmap_mode="r"), named_ids).any():
            return packed, True
        wrong.append(packed)
    for packed in wrong:
        if packed.is_file():
            warnings.warn(
                f"{packed} was packed by version 0.1 with wrong ids (docs/data.md says which); the "
                "text is packed anew",
                stacklevel=3,
            )
    return current, False


def _check_spelling(files: list[Path], tokenizer: Tokenizer) -> None:
    """Checks text that is packed already, since version 0.1 dropped some characters silently.

    Raises: InputError naming the characters that the tokenizer cannot encode.
    """
    if tokenizer.spells_all:
        return
    tokenizer = tokenizer.for_documents()
    for where, chunks in chain.from_iterable(map(read_documents, files)):
        with prefix_errors(where):
            for chunk in chunks:
                tokenizer.check_spelling([chunk])


def _is_intact(packed: Path) -> bool:
    """Whether the packed rows exist and match their digest."""
    summary = packed.with_suffix(".json")
    if not (packed.is_file() and summary.is_file()):
        return False
    try:
        return read_json(summary).get("sha256") == file_sha256(packed)
    except InputError:  # half written
        return False


def _tokenise_files(
    files: list[Path], tokenizer: Tokenizer, eos_id: int, mask_id: int | None
) -> Iterator[list[EncodedPiece]]:
    from tqdm import tqdm

    documents = chain.from_iterable(map(read_documents, files))
    # disable=None: no bar where stderr is a file.
    with tqdm(desc="tokenising", unit=" documents", disable=None) as progress:
        for pieces in encode_documents(documents, tokenizer.for_documents(), eos_id, mask_id):
            yield pieces
            progress.update(sum(piece.ends_document for piece in pieces))


def _pack(
    files: list[Path],
    tokenizer: Tokenizer,
    eos_id: int,
    mask_id: int | None,
    length: int,
    packed: Path,
) -> None:
    """Writes the rows to `packed`, and counts, sources and digest to the .json beside it."""
    dtype = token_dtype(tokenizer.vocab_size - 1, eos_id)
    with _temporary_file(packed) as out:
        counts = {"documents": 0, "tokens": 0}
        batches = _tokenise_files(files, tokenizer, eos_id, mask_id)
        rows = _pack_batches(batches, eos_id, length, dtype, counts)
        counts["rows"] = len(write_rows(out, rows, length, dtype))
        require(
            counts["rows"] > 0,
            f"{', '.join(map(str, files[:3]))}: {counts['tokens']} tokens do not fill one row of "
            f"length={length}; add text or shorten the rows",
        )
        out.flush()
        facts = {
            "length": length,
            "files": [str(p) for p in files],
            "tokenizer": tokenizer.fingerprint,
            "sha256": file_sha256(out.name),
        }
        summary = Path(out.name).with_suffix(".json")
        write_json(summary, counts | facts, digest=True)
        summary.replace(packed.with_suffix(".json"))
        Path(out.name).replace(packed)


@contextlib.contextmanager
def _temporary_file(packed: Path) -> Iterator[BinaryIO]:
    """Opens a temporary file beside `packed`; it is removed at the end unless it was renamed.

    Several processes may pack the same text at once; the last rename wins, with equal bytes. Each
    holds a lock on its file, so files that killed processes left are recognised and removed.

    Raises: InputError if it cannot be written.
    """
    try:
        packed.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(packed.parent)
        path, out = _open_locked(packed)
        with out:
            try:
                yield out
            finally:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"{error.filename2 or error.filename or packed.parent} cannot be written to "
            f"({error.strerror}); choose another cache"
        ) from error


def _open_locked(packed: Path) -> tuple[Path, BinaryIO]:
    """Opens a new file beside `packed`. One that is not locked yet may be taken for abandoned."""
    while True:
        path = packed.with_name(f"{packed.stem}.{uuid.uuid4().hex}{UNFINISHED_SUFFIX}")
        out = path.open("wb")
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(out, fcntl.LOCK_EX)
        if path.exists():
            return path, out
        out.close()


def _remove_abandoned(cache: Path) -> None:
    """Removes temporary files of killed processes: those that no process has locked."""
    for path in cache.glob(f"*{UNFINISHED_SUFFIX}"):
        if not re.fullmatch(r"[0-9a-f]{16}\.[0-9a-f]{32}", path.stem):
            continue
        with contextlib.suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
            path.with_suffix(".json").unlink(missing_ok=True)


def _pack_batches(
    batches: Iterator[list[EncodedPiece]],
    eos_id: int,
    length: int,
    dtype: np.dtype,
    counts: dict[str, int],
) -> Iterator[PackedRows]:
    """Yields the rows of each batch of pieces. Adds documents and tokens to `counts`.

    Documents without text are left out.
    """
    rest: list[int] = []  # less than a row, between batches
    for pieces in batches:
        rows, rest = pack_stream(pieces, rest, length, eos_id, dtype)
        kept = [piece for piece in pieces if not piece.is_empty_document]
        counts["documents"] += sum(piece.ends_document for piece in kept)
        counts["tokens"] += sum(len(piece.ids) for piece in kept)
        yield rows
