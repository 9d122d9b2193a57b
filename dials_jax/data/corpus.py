"""Reads a corpus that `prepare.py` has written.

    manifest.json     settings, counts and digests; written last: a folder with it is complete
    tokenizer.json    the tokenizer that made the rows
    parts/            .npy files with the rows of some thousand documents each, and .crc files
                      with a checksum of each row
    array_record/     the same rows as ArrayRecord

A stopped `prepare.py` continues after the last part. The parts are kept, because machines without
Grain read them; they take as much disk space as the ArrayRecord files (18 GB for OpenWebText).
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Integer

from dials_jax.config import CorpusData
from dials_jax.data.arrayrecord import ArrayRecordRows, missing_grain_packages
from dials_jax.data.packing import PackedRows, row_sums
from dials_jax.data.records import file_sha256
from dials_jax.data.text import PackedText, RowStore
from dials_jax.data.tokenizer import Tokenizer
from dials_jax.errors import InputError, nearest, require
from dials_jax.files import read_json, write_json

PART_AGAIN = "delete its .json and run prepare.py again"
MANIFEST, PARTS, ARRAY_RECORD = "manifest.json", "parts", "array_record"
FILE_FACTS = "files.json"  # facts about files; they hold while size, date and inode are the same


class PartRows:
    """The rows of several .npy files, one file after the other, memory-mapped (a RowStore).

    Every row that is read is compared with its checksum. Earlier versions wrote none.

    Raises: InputError for a file that is missing or no .npy file, and for a damaged row.
    """

    def __init__(self, files: Sequence[Path]):
        self.files = files
        try:
            self.parts = [np.load(file, mmap_mode="r") for file in files]
            self.sums = [
                np.fromfile(sums_of(file), "<u4") if sums_of(file).exists() else None
                for file in files
            ]
        except (OSError, ValueError) as error:
            raise InputError(f"{error}; delete the folder and run prepare.py again") from error
        self.ends = np.cumsum([len(part) for part in self.parts])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, indices: Int[np.ndarray, "B"]) -> Integer[np.ndarray, "B T"]:
        number = np.searchsorted(self.ends, indices, side="right")
        rows = np.empty((len(indices), self.parts[0].shape[1]), self.parts[0].dtype)
        for n in map(int, np.unique(number)):
            here = number == n
            part = self.parts[n]
            inside = indices[here] - (self.ends[n] - len(part))
            rows[here] = part[inside]
            self._require_sound(n, rows[here], inside)
        return rows

    def _require_sound(self, part: int, rows: PackedRows, numbers: Int[np.ndarray, "n"]) -> None:
        sums, file = self.sums[part], self.files[part]
        if sums is None:
            return
        whole = len(sums) == len(self.parts[part])
        sound = whole and np.array_equal(row_sums(rows), sums[numbers])
        require(sound, f"{file}, or {sums_of(file).name}, is damaged; {PART_AGAIN}")


def sums_of(file: Path) -> Path:
    """The file of the checksums of a part's rows."""
    return file.with_suffix(".crc")


def read_manifest(cfg: CorpusData) -> dict[str, Any]:
    """Reads manifest.json and compares it with the configuration.

    Raises: InputError if the folder is not prepared or damaged, or was prepared with other
      settings.
    """
    folder = Path(cfg.folder)
    require(
        (folder / MANIFEST).is_file(),
        f"{folder} is {'only half' if (folder / PARTS).is_dir() else 'not'} prepared (it has no "
        f"{MANIFEST}); run prepare.py with this configuration",
    )
    manifest = read_json(folder / MANIFEST)
    require(
        _is_manifest(manifest),
        f"{folder / MANIFEST} is damaged; run prepare.py again, which writes it anew",
    )
    named = ("dataset",) if cfg.dataset else ()  # readers may leave out where the rows came from
    for name in ("length", "packing", "num_validation", *named):
        there, here = manifest["settings"].get(name), getattr(cfg, name)
        require(
            there == here,
            f"{folder} was prepared with {name}={there!r}, not {here!r}; change the setting, or "
            "prepare another folder",
        )
    require(
        cfg.split in manifest["splits"],
        f"{folder} has no split {cfg.split!r}{nearest(cfg.split, manifest['splits'])}",
    )
    return manifest


def _is_manifest(manifest: dict[str, Any]) -> bool:
    """Whether it has all values that readers need, and every part is a file of this folder."""
    try:
        known = {"tokenizer", "eos_id"} <= manifest["settings"].keys()
        return known and all(
            all(map(is_part_entry, split["parts"]))
            and 0 < split["rows"] == sum(part["rows"] for part in split["parts"])
            for split in manifest["splits"].values()
        )
    except (KeyError, TypeError, AttributeError):
        return False


def is_part_entry(entry: Any) -> bool:
    """Whether `entry` names a file of the folder, its number of rows and its digest."""
    return (
        isinstance(entry, dict)
        and re.fullmatch(r"[\w-]+\.npy", str(entry.get("file"))) is not None
        and type(entry.get("rows")) is int
        and isinstance(entry.get("sha256"), str)
    )


def load_corpus(cfg: CorpusData, eos_id: int | None, tokenizer: Tokenizer) -> PackedText:
    """Opens the rows of `cfg.split` in `cfg.folder`. Both readers give the same rows in one order.

    Raises: InputError for a folder that is not prepared, damaged, or made with another length,
      tokenizer or end of text.
    """
    folder, manifest = Path(cfg.folder), read_manifest(cfg)
    settings, split = manifest["settings"], manifest["splits"][cfg.split]
    require(
        settings["tokenizer"] != tokenizer.misread,
        f"{folder} was prepared by version 0.1, which took this tokenizer for GPT-2's: its ids are "
        "wrong; prepare another folder",
    )
    require(
        settings["tokenizer"] in tokenizer.fingerprints,
        f"{folder} was prepared with another tokenizer; take {folder}/tokenizer.json, or prepare "
        "another folder",
    )
    require(
        settings["eos_id"] == eos_id,
        f"{folder} was prepared with eos_id={settings['eos_id']}, but the model has {eos_id}; "
        "prepare another folder",
    )
    rows: RowStore
    if _choose_reader(cfg) == "grain":
        rows = ArrayRecordRows(folder / ARRAY_RECORD, cfg.split)
        require(
            len(rows) == split["rows"], f"{folder / ARRAY_RECORD} is incomplete; prepare it again"
        )
    else:
        verify_parts(folder, split)
        rows = open_part_rows(folder, split, cfg.length)
    digests = "".join(part["sha256"] for part in split["parts"])
    return PackedText(
        tokens=rows,
        fingerprint=hashlib.sha256(f"{cfg.split} {digests}".encode()).hexdigest()[:16],
        prompt_length=cfg.prompt_length,
        random_length_prob=cfg.random_length_prob,
        fill_id=eos_id,
        vocab_size=tokenizer.vocab_size,
    )


def read_file_facts(folder: Path) -> dict[str, dict[str, Any]]:
    """Reads the facts about files, by path; an empty dict if they are missing or damaged."""
    with contextlib.suppress(InputError):
        facts = read_json(folder / FILE_FACTS)
        return {path: fact for path, fact in facts.items() if isinstance(fact, dict)}
    return {}


def verify_parts(folder: Path, split: dict[str, Any], again: bool = False) -> None:
    """Compares the parts of a split with the digests in its entry of the manifest.

    This reads every byte. The result is stored in the folder if that is writable; then files of the
    same size, date and inode are not read a second time.

    Args:
      again: read all parts, even if they were verified before.

    Raises: InputError naming the part that is missing or has changed.
    """
    from tqdm import tqdm

    facts = read_file_facts(folder)
    # No path ends with a slash, so this key differs from those of the corpus's files.
    verified = facts.setdefault(f"{PARTS}/", {})
    fresh = {}
    for part in split["parts"]:
        path = folder / PARTS / part["file"]
        require(path.is_file(), f"{path} is missing; {PART_AGAIN}")
        status = path.stat()
        stamp = [status.st_size, status.st_mtime_ns, status.st_ino, part["sha256"]]
        if again or verified.get(part["file"]) != stamp:
            fresh[part["file"]] = stamp
    # disable=None: no bar where stderr is a file.
    for part in tqdm([p for p in split["parts"] if p["file"] in fresh], "verifying", disable=None):
        path = folder / PARTS / part["file"]
        require(file_sha256(path) == part["sha256"], f"{path} is damaged; {PART_AGAIN}")
        sums = sums_of(path)
        whole = sums.is_file() and file_sha256(sums) == part.get("sums_sha256")
        require(whole or "sums_sha256" not in part, f"{sums} is damaged; {PART_AGAIN}")
    if fresh:
        verified |= fresh
        with contextlib.suppress(OSError):  # a read-only folder
            write_json(folder / FILE_FACTS, facts, digest=True)


def open_part_rows(folder: Path, split: dict[str, Any], length: int) -> PartRows:
    """Opens the .npy files of one split of the manifest.

    Raises: InputError if a file is missing, or its shape or dtype is not that of the manifest.
    """
    files = [folder / PARTS / part["file"] for part in split["parts"]]
    rows = PartRows(files)
    for file, part, found in zip(files, split["parts"], rows.parts, strict=True):
        require(
            found.shape == (part["rows"], length) and found.dtype.kind == "u",
            f"{file} holds {found.shape} {found.dtype} instead of {part['rows']} rows of {length} "
            "tokens; delete the folder and run prepare.py again",
        )
    return rows


def _choose_reader(cfg: CorpusData) -> str:
    """Returns "grain" or "numpy"; "auto" is Grain if it is installed and there is ArrayRecord."""
    missing, records = missing_grain_packages(), Path(cfg.folder) / ARRAY_RECORD
    if cfg.reader == "auto":
        return "numpy" if missing or not records.is_dir() else "grain"
    if cfg.reader == "grain":
        require_grain(missing)
        require(records.is_dir(), f"{records} is missing; run prepare.py again, it adds it")
    return cfg.reader


def require_grain(missing: Sequence[str]) -> None:
    """Raises: InputError naming the packages in `missing`, from `missing_grain_packages`."""
    require(
        not missing,
        f"reader='grain' needs {', '.join(missing)}; pip install 'dials_jax[data]', or set "
        "reader='numpy'",
    )
