"""Prepares a corpus once, from documents to rows on disk; it may be stopped and continued.

Documents are packed part by part. A part is written under a temporary name and renamed; then its
entry is written to a .json beside it. A part with an entry is never written again. So a stopped run
continues after its last part, and the result has the same bytes as without the stop.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from dials_jax.config import CorpusData, ModelConfig
from dials_jax.data.arrayrecord import (
    ArrayRecordRows,
    missing_grain_packages,
    require_equal_ends,
    write_array_record,
)
from dials_jax.data.corpus import (
    ARRAY_RECORD,
    MANIFEST,
    PARTS,
    is_part_entry,
    open_part_rows,
    require_grain,
    sums_of,
    verify_parts,
)
from dials_jax.data.documents import Documents, open_documents
from dials_jax.data.encoding import encode_documents
from dials_jax.data.packing import BATCH_DOCUMENTS, PACKINGS, PackedRows, token_dtype, write_rows
from dials_jax.data.records import Document, file_sha256
from dials_jax.data.tokenizer import Tokenizer, check_tokenizer, load_tokenizer
from dials_jax.errors import InputError, require
from dials_jax.files import read_json, replacing, write_json
from dials_jax.progress import Pace, format_bytes, progress_bar
from dials_jax.workdir import differences, exclusive, read_mark, require_unclaimed

SETTINGS = "settings.json"  # the settings that a folder was started with
PROBE_DOCUMENTS, PROBE_TOKENS = 1000, 10**6  # after as many a split's size and time are told
PART_BATCHES = 20  # batches of documents per part: a stop loses at most a minute's work


def prepare_corpus(cfg: CorpusData, model_config: ModelConfig) -> dict[str, Any]:
    """Tokenises and packs the corpus into `cfg.folder`; continues or verifies what is there.

    Returns: the manifest, with the counts and digests of every split.
    Raises: InputError for a corpus, tokenizer or folder that does not fit, before work begins.
    """
    with exclusive(cfg.folder, "data.folder") as folder:
        try:
            return _prepare(cfg, model_config, folder)
        except OSError as error:  # a full disk, a file that is no longer there
            reason = f"{error.strerror or error}: {error.filename or folder}"
            raise InputError(
                f"{folder} is not prepared ({reason}); mend that and run prepare.py again, it "
                "continues"
            ) from error


def _prepare(cfg: CorpusData, model_config: ModelConfig, folder: Path) -> dict[str, Any]:
    tokenizer = load_tokenizer(cfg.tokenizer)
    check_tokenizer(tokenizer, model_config)
    require(model_config.eos_id is not None, "the model has no eos_id; packing needs one")
    if cfg.reader == "grain":
        require_grain(missing_grain_packages())
    documents = open_documents(cfg)
    require(
        cfg.num_validation < documents.count,
        f"num_validation={cfg.num_validation} leaves nothing of {documents.count} documents; "
        "lower it",
    )
    settings = _settings(cfg, model_config, tokenizer, documents)
    names = (MANIFEST, PARTS, ARRAY_RECORD, "tokenizer.json")
    require_unclaimed(folder, SETTINGS, names, reads=cfg.tokenizer)
    former = {"tokenizer": tokenizer.fingerprints, "source": (documents.former_digest,)}
    _claim_folder(folder, settings, former)
    tokenizer.save(folder)
    packer = _Packer(cfg, model_config, tokenizer.for_documents(), documents, folder / PARTS)
    num_train = documents.count - cfg.num_validation
    # The small split first: if it fills no row, that should show before hours of work.
    ranges = {"validation": range(num_train, documents.count), "train": range(num_train)}
    splits = {}
    for name, numbers in ranges.items():
        if numbers:
            splits[name] = packer.pack_split(name, numbers)
            _verify_split(folder, name, splits[name], len(numbers), cfg.length)
    _add_array_record(cfg, folder, splits)
    manifest = {"settings": settings, "splits": splits, "skipped": documents.skipped}
    write_json(folder / MANIFEST, manifest, digest=True)
    return manifest


def _settings(
    cfg: CorpusData, model_config: ModelConfig, tokenizer: Tokenizer, documents: Documents
) -> dict[str, Any]:
    """Returns everything that the rows depend on."""
    return {
        "documents": documents.count,
        "source": documents.digest,
        "dataset": cfg.dataset,
        "num_validation": cfg.num_validation,
        "tokenizer": tokenizer.fingerprint,
        "eos_id": model_config.eos_id,
        "packing": cfg.packing,
        "length": cfg.length,
        "part_documents": PART_BATCHES * BATCH_DOCUMENTS,
    }


def _claim_folder(
    folder: Path, settings: dict[str, Any], former: Mapping[str, Collection[str]]
) -> None:
    """Writes `settings` into the folder, after comparing them with those that it was begun with.

    Args:
      former: by setting, other values that earlier versions computed for the same corpus.

    Raises: InputError naming the first setting that differs.
    """
    begun = read_mark(folder / SETTINGS, "delete the folder") or {}
    source = str(begun.get("source", settings["source"]))
    require(
        source.startswith("files:") or not settings["source"].startswith("files:"),
        f"{folder} was prepared by an earlier version, which read the files of "
        f"dataset={settings['dataset']} otherwise; train from it as it is, or choose another "
        "folder",
    )
    known = {name: there for name, there in begun.items() if there not in former.get(name, ())}
    wanted = {name: settings.get(name) for name in known}
    for name, (there, here) in differences(known, wanted).items():
        raise InputError(
            f"{folder} was begun with {name}={there!r}, not {here!r}; choose another folder, or "
            "delete it"
        )
    write_json(folder / SETTINGS, settings, digest=True)


@dataclass(frozen=True)
class _Packer:
    """Packs documents into parts below `folder`."""

    cfg: CorpusData
    model_config: ModelConfig
    tokenizer: Tokenizer  # from `Tokenizer.for_documents()`
    documents: Documents
    folder: Path

    def pack_split(self, split: str, numbers: range) -> dict[str, Any]:
        """Writes the missing parts of one split; returns its entry of the manifest.

        Args:
          numbers: of the split's documents in the corpus.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        size, rest, parts = PART_BATCHES * BATCH_DOCUMENTS, [], []
        # One pass over the corpus, from the first missing part on.
        documents, next_document = iter(()), None
        with progress_bar(len(numbers), 0, split, "document") as progress:
            outlook = None
            for part, first in enumerate(range(0, len(numbers), size)):
                entry_file = self.folder / f"{split}-{part:05d}.json"
                if not entry_file.exists():
                    if next_document != first:
                        documents = self.documents.read(numbers[first], numbers.stop)
                    outlook = outlook or self._outlook(split, len(numbers) - first, progress)
                    self._write_part(entry_file, documents, rest, outlook.advance)
                    next_document = first + size
                parts.append(_read_part_entry(entry_file))
                rest = parts[-1].pop("rest")
                progress.update(first + parts[-1]["documents"] - progress.n)
        counts = {name: sum(p[name] for p in parts) for name in ("documents", "tokens", "rows")}
        return {**counts, "parts": parts}

    def _write_part(
        self,
        entry_file: Path,
        documents: Iterator[Document],
        rest: list[int],
        advance: Callable[[int, int], Any],
    ) -> None:
        """Writes the rows of the next documents, then the part's entry, with the tokens left over.

        Args:
          rest: the tokens left over from the part before.
          advance: is told the numbers of documents and tokens that are done.
        """
        dtype, counts, rest = self._dtype, {"documents": 0, "tokens": 0}, list(rest)
        rows = self._pack_rows(documents, rest, dtype, counts, advance)
        data = entry_file.with_suffix(".npy")
        with replacing(data) as file:
            sums = write_rows(file, rows, self.cfg.length, dtype)
        with replacing(sums_of(data)) as file:
            file.write(sums.tobytes())
        counts["rows"] = len(sums)
        digests = {"sha256": file_sha256(data), "sums_sha256": file_sha256(sums_of(data))}
        entry = {"file": data.name, **counts, **digests, "rest": rest}
        write_json(entry_file, entry, digest=True)

    @property
    def _dtype(self) -> np.dtype:
        return token_dtype(self.tokenizer.vocab_size - 1, self.model_config.eos_id)

    def _outlook(self, split: str, left: int, bar: Any) -> _Outlook:
        copies = 1 + (self.cfg.reader == "grain")  # which has its rows in files of its own
        return _Outlook(split, left, copies * self._dtype.itemsize, self.folder, bar)

    def _pack_rows(
        self,
        documents: Iterator[Document],
        rest: list[int],
        dtype: np.dtype,
        counts: dict[str, int],
        advance: Callable[[int, int], Any],
    ) -> Iterator[PackedRows]:
        """Yields the rows of a few documents at a time; updates `rest` and `counts`."""
        packing, length = PACKINGS[self.cfg.packing], self.cfg.length
        eos_id, mask_id = self.model_config.eos_id, self.model_config.mask_id
        for _ in range(PART_BATCHES):
            thousand = islice(documents, BATCH_DOCUMENTS)
            for pieces in encode_documents(thousand, self.tokenizer, eos_id, mask_id):
                rows, rest[:] = packing.pack(pieces, rest, length, eos_id, dtype)
                ended = sum(piece.ends_document for piece in pieces)
                tokens = sum(len(piece.ids) for piece in pieces)
                counts["documents"] += ended
                counts["tokens"] += tokens
                advance(ended, tokens)
                yield rows
            if not packing.keeps_rest:
                rest.clear()


class _Outlook:
    """The progress of a split, and once, from its first documents, what the rest takes."""

    def __init__(self, split: str, left: int, token_bytes: int, folder: Path, bar: Any):
        """Args: left: documents to do. token_bytes: that a token takes on the disk."""
        self.split, self.left, self.token_bytes = split, left, token_bytes
        self.folder, self.bar = folder, bar
        self.documents, self.tokens, self.began = 0, 0, time.perf_counter()
        self.pace: Pace | None = Pace(left, f"{split}: the rest", say=bar.write)

    def advance(self, documents: int, tokens: int) -> None:
        self.bar.update(documents)
        self.documents, self.tokens = self.documents + documents, self.tokens + tokens
        enough = self.documents >= PROBE_DOCUMENTS or self.tokens >= PROBE_TOKENS
        if self.pace is None or not (enough and self.documents):
            return
        total = self.tokens / self.documents * self.left
        needed, free = total * self.token_bytes, shutil.disk_usage(self.folder).free
        self.bar.write(
            f"{self.split}: {self.left:,} documents, about {total:,.0f} tokens, "
            f"{format_bytes(needed)} on the disk"
        )
        if needed > free:
            self.bar.write(
                f"this will not fit: {self.folder} has {format_bytes(free)} free; make room, or "
                "choose another data.folder"
            )
        self.pace.measured(self.documents, time.perf_counter() - self.began)
        self.pace = None


def _verify_split(
    folder: Path, name: str, split: dict[str, Any], documents: int, length: int
) -> None:
    """Raises: InputError if the counts of a split are wrong, or a part has changed."""
    require(
        split["documents"] == documents,
        f"{folder}, {name}: {split['documents']} of {documents} documents were packed; the corpus "
        "changed meanwhile: delete the folder and start again",
    )
    require(
        split["rows"] > 0,
        f"{name}: {split['tokens']} tokens of {documents} documents do not fill one row of "
        f"length={length}; add text, shorten the rows or change num_validation",
    )
    verify_parts(folder, split, again=True)


def _read_part_entry(path: Path) -> dict[str, Any]:
    entry = read_json(path)
    counts = all(type(entry.get(name)) is int for name in ("documents", "tokens"))
    require(
        counts and is_part_entry(entry) and isinstance(entry.get("rest"), list),
        f"{path} is damaged; delete it and run prepare.py again",
    )
    return entry


def _add_array_record(cfg: CorpusData, folder: Path, splits: dict[str, dict[str, Any]]) -> None:
    """Writes the rows as ArrayRecord too, or verifies what is there.

    Does nothing with reader="numpy", or if the packages are not installed.
    """
    if cfg.reader == "numpy":
        return
    if missing := missing_grain_packages():
        names = ", ".join(missing)
        print(
            f"no ArrayRecord is written: {names} is not installed; the .npy parts are read instead"
        )
        return
    rows = {name: open_part_rows(folder, split, cfg.length) for name, split in splits.items()}
    if (folder / ARRAY_RECORD).is_dir():
        for name, wanted in rows.items():
            require_equal_ends(
                ArrayRecordRows(folder / ARRAY_RECORD, name), wanted, f"{folder / ARRAY_RECORD}"
            )
    else:
        write_array_record(rows, cfg.length, folder / ARRAY_RECORD)
