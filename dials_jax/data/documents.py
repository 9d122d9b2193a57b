"""Where a corpus comes from: files or a Hugging Face data set, as documents in a fixed order."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from dials_jax.config import CorpusData, InputError, nearest, read_json, require, write_json
from dials_jax.data.records import (
    JSON_LINES,
    TEXT,
    Document,
    content_sha256,
    expand_paths,
    located,
    read_documents,
    require_text,
)

READ_AHEAD = 1000  # documents that a Hugging Face data set hands out at a time


@dataclass(frozen=True)
class Documents:
    """Documents 0 to `count` of a corpus.

    Attributes:
      digest: equal for equal corpora.
      read: yields documents start to stop, each as (where, its text in pieces).
      skipped: files that were left out.
    """

    count: int
    digest: str
    read: Callable[[int, int], Iterator[Document]]
    skipped: tuple[str, ...] = ()


def open_documents(cfg: CorpusData) -> Documents:
    """Counts the documents and reads all files once, so that what is broken shows up first.

    What was found is kept in `cfg.folder`; files of the same size and date are not read again.

    Raises: InputError for a corpus that is missing, and for files that cannot be read, named and
      counted, unless `skip_bad_files`.
    """
    require(
        bool(cfg.dataset) != bool(cfg.paths),
        "give either dataset= (a Hugging Face data set) or paths= (files), not both or neither",
    )
    return _hub_documents(cfg) if cfg.dataset else _file_documents(cfg)


def _file_documents(cfg: CorpusData) -> Documents:
    found = _survey(cfg)
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
    digest = hashlib.sha256(json.dumps([cfg.text_field, content]).encode()).hexdigest()

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


def _survey(cfg: CorpusData) -> dict[str, dict[str, Any]]:
    """What is known of every file: its documents, digest, and why it cannot be read."""
    from tqdm import tqdm

    notes = Path(cfg.folder) / "files.json"
    known = read_json(notes) if notes.is_file() else {}
    files, field, found = expand_paths(cfg.paths, TEXT + JSON_LINES), cfg.text_field, {}
    # disable=None: no bar where stderr is a file.
    for path in tqdm(files, "reading", unit=" files", disable=None):
        stamp = [path.stat().st_size, path.stat().st_mtime_ns, field]
        entry = known.get(str(path), {})
        unchanged = entry.get("stamp") == stamp and not entry["error"]
        found[str(path)] = entry if unchanged else {"stamp": stamp, **_look_at(path, field)}
    write_json(notes, found)
    return found


def _look_at(path: Path, field: str) -> dict[str, Any]:
    count = 0
    try:
        digest = content_sha256(path)
        for _, chunks in read_documents(path, field):
            deque(chunks, maxlen=0)  # read to its end
            count += 1
    except InputError as error:
        return {"documents": 0, "sha256": "", "error": str(error)}
    return {"documents": count, "sha256": digest, "error": ""}


def _hub_documents(cfg: CorpusData) -> Documents:
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            "the package datasets is missing; pip install 'dials_jax[data]', or give paths="
        ) from error
    name = ", ".join(filter(None, [cfg.dataset, cfg.dataset_config, cfg.dataset_split]))
    try:
        found = datasets.load_dataset(
            cfg.dataset, cfg.dataset_config or None, split=cfg.dataset_split
        )
    except Exception as error:  # anything from no network to a bad name
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"data set {name}: {reason}; correct it or give paths=") from error
    field = cfg.text_field
    require(
        field in found.column_names,
        f"data set {name} has no field {field!r}{nearest(field, found.column_names)}",
    )
    missing = found.data.column(field).null_count  # noted in the files, so nothing is read
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
                with located(where):
                    require_text(text, field)
                yield where, (text,)

    # The package's fingerprint names the prepared files: a new version of the data changes it.
    identity = json.dumps([name, field, len(found), found._fingerprint])
    return Documents(len(found), hashlib.sha256(identity.encode()).hexdigest(), read)
