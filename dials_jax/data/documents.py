"""Reads a corpus, files or a Hugging Face data set, as documents in a fixed order."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from dials_jax.config import CorpusData
from dials_jax.data.corpus import FILE_FACTS, PARTS, read_file_facts
from dials_jax.data.records import (
    JSON_LINES_SUFFIXES,
    TEXT_SUFFIXES,
    Document,
    content_sha256,
    expand_paths,
    prefix_errors,
    read_documents,
    require_text,
    warn_unread_files,
)
from dials_jax.errors import InputError, nearest, require, require_packages
from dials_jax.files import write_json

READ_AHEAD = 1000  # documents that a Hugging Face data set hands out at a time


@dataclass(frozen=True)
class Documents:
    """The documents of a corpus, numbered from 0 to `count` - 1.

    Attributes:
      digest: equal for corpora with equal documents.
      read: `read(start, stop)` yields these documents, each as (where, its text in pieces).
      skipped: files that were left out.
      former_digest: the digest that earlier versions computed for the same documents.
    """

    count: int
    digest: str
    read: Callable[[int, int], Iterator[Document]]
    skipped: tuple[str, ...] = ()
    former_digest: str = ""


def open_documents(cfg: CorpusData) -> Documents:
    """Counts the documents. Reads all files once, so that broken ones are found before the work.

    The result is stored in `cfg.folder`; files of the same size and date are not read again.

    Raises: InputError for a corpus that is missing; unless `skip_bad_files`, also for files that
      cannot be read, with their number and names.
    """
    require(
        bool(cfg.dataset) != bool(cfg.paths),
        "give either dataset= (a Hugging Face data set) or paths= (files), not both or neither",
    )
    if cfg.paths:
        return _file_documents(cfg, expand_paths(cfg.paths, TEXT_SUFFIXES + JSON_LINES_SUFFIXES))
    require_packages("data", "datasets")
    if Path(cfg.dataset).is_dir():
        return _local_documents(cfg)
    return _hub_documents(cfg)


def _file_documents(cfg: CorpusData, paths: list[Path]) -> Documents:
    found = _survey_files(cfg, paths)
    bad = {path: entry["error"] for path, entry in found.items() if entry["error"]}
    files = [(Path(path), entry) for path, entry in found.items() if path not in bad]
    if bad:
        count, named = f"{len(bad)} of {len(found)} files cannot be read", list(bad.values())
        more = f"; and {len(named) - 3} more" if len(named) > 3 else ""
        require(
            cfg.skip_bad_files,
            f"{count}: {'; '.join(named[:3])}{more}. Mend them or set skip_bad_files=True",
        )
        print(f"skipping: {count}", *named, sep="\n  ", file=sys.stderr)
    content = [[path.name, entry["sha256"]] for path, entry in files]
    digest = _digest([cfg.text_field, content])

    def read(start: int, stop: int) -> Iterator[Document]:
        first = 0  # number of the file's first document
        for path, entry in files:
            last = first + entry["documents"]
            if start < last and first < stop:
                documents = read_documents(path, cfg.text_field)
                yield from islice(documents, max(start - first, 0), stop - first)
            first = last

    count = sum(entry["documents"] for _, entry in files)
    return Documents(count, digest, read, skipped=tuple(bad))


def _survey_files(cfg: CorpusData, paths: list[Path]) -> dict[str, dict[str, Any]]:
    """Collects facts about every file: its documents, its digest, and why it cannot be read."""
    from tqdm import tqdm

    known = read_file_facts(Path(cfg.folder))
    field, found = cfg.text_field, {}
    # disable=None: no bar where stderr is a file.
    for path in tqdm(paths, "reading", unit=" files", disable=None):
        stamp = [path.stat().st_size, path.stat().st_mtime_ns, field]
        entry = known.get(str(path), {})
        unchanged = entry.get("stamp") == stamp and entry.get("error") == ""
        found[str(path)] = entry if unchanged else {"stamp": stamp, **_survey_file(path, field)}
    parts = f"{PARTS}/"  # the key of what `corpus.verify_parts` stores
    facts = ({parts: known[parts]} if parts in known else {}) | found
    write_json(Path(cfg.folder) / FILE_FACTS, facts, digest=True)
    return found


def _survey_file(path: Path, field: str) -> dict[str, Any]:
    """Reads a whole file: its number of documents and SHA-256, or why it cannot be read."""
    count = 0
    try:
        digest = content_sha256(path)
        for _, chunks in read_documents(path, field):
            deque(chunks, maxlen=0)  # read to its end
            count += 1
    except InputError as error:
        return {"documents": 0, "sha256": "", "error": str(error)}
    return {"documents": count, "sha256": digest, "error": ""}


def _local_documents(cfg: CorpusData) -> Documents:
    """Reads a data set in a local folder; files of the formats that `paths` takes as `paths` does.

    The package decides which files belong to a split, by their names or the folder's README.md. Its
    own reader would leave out all formats but the most frequent one, and rewrite dates in JSON.
    """
    import datasets

    with _naming_dataset(cfg):
        config = datasets.load_dataset_builder(cfg.dataset, cfg.dataset_config or None).config
        files = {str(split): list(of) for split, of in (config.data_files or {}).items()}
        split = cfg.dataset_split.partition("[")[0]  # "train[:10%]" takes some of its documents
    chosen = files.get(split, [])
    suffixes = TEXT_SUFFIXES + JSON_LINES_SUFFIXES
    readable = chosen and all(file.endswith(suffixes) for file in chosen)
    if not readable or split != cfg.dataset_split:
        digests = [[Path(file).name, content_sha256(Path(file))] for file in sorted(chosen)]
        return _hub_documents(cfg, digests)
    matching = _matching_files(cfg.dataset, split)
    # A README.md may choose other files than their names do.
    paths = [Path(file) for file in (matching if set(chosen) <= set(matching) else chosen)]
    warn_unread_files(Path(cfg.dataset), paths, suffixes)
    documents = _file_documents(cfg, sorted(p for p in paths if p.name.endswith(suffixes)))
    return dataclasses.replace(documents, digest=f"files:{documents.digest}")


def _matching_files(folder: str, split: str) -> list[str]:
    """Returns the files, of any format, that the package assigns to a split by their names."""
    from datasets.data_files import get_data_patterns, resolve_pattern

    found: set[str] = set()
    for name, patterns in get_data_patterns(folder).items():
        for pattern in patterns if name == split else ():
            with contextlib.suppress(FileNotFoundError):  # nothing fits this one
                found.update(resolve_pattern(pattern, folder))
    return sorted(found)


@contextlib.contextmanager
def _naming_dataset(cfg: CorpusData) -> Iterator[None]:
    """Turns any error of the package into one line that names the data set."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        name = _dataset_name(cfg)
        raise InputError(f"data set {name}: {reason}; correct it or give paths=") from error


def _dataset_name(cfg: CorpusData) -> str:
    return ", ".join(filter(None, [cfg.dataset, cfg.dataset_config, cfg.dataset_split]))


def _hub_documents(cfg: CorpusData, files: list[list[str]] | None = None) -> Documents:
    """Reads a data set with the package `datasets`.

    Args:
      files: names and digests of its files, if they are local.

    Raises: InputError for a data set that cannot be loaded, or without a text in every document.
    """
    import datasets

    name = _dataset_name(cfg)
    with _naming_dataset(cfg):
        found = datasets.load_dataset(
            cfg.dataset, cfg.dataset_config or None, split=cfg.dataset_split
        )
    field = cfg.text_field
    require(
        field in found.column_names,
        f"data set {name} has no field {field!r}{nearest(field, found.column_names)}",
    )
    missing = found.data.column(field).null_count  # stored in the files, so no row is read
    require(
        not missing,
        f"data set {name}: field {field!r} is None in {missing} of {len(found)} documents; it must "
        "be a string in all of them: write those that have one to files, and give paths=",
    )

    def read(start: int, stop: int) -> Iterator[Document]:
        for first in range(start, stop, READ_AHEAD):
            texts = found[first : min(first + READ_AHEAD, stop)][field]
            for i, text in enumerate(texts):
                where = f"{name}[{first + i}]"
                with prefix_errors(where):
                    require_text(text, field)
                yield where, (text,)

    # The package's fingerprint names the prepared files: a new version of the data changes it. For
    # files on this machine it changes with their dates, too.
    identity = [name, field, len(found), found._fingerprint]
    former = _digest(identity)
    digest = _digest([*identity[:3], files]) if files else former
    return Documents(len(found), digest, read, former_digest=former)


def _digest(identity: list) -> str:
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()
