"""Reads safetensors files as memory-mapped arrays.

The package `safetensors` checks that a file follows the format, but its arrays are copies. Here a
tensor is a view of the mapped file, which needs no memory until it is read.

Format: 8 bytes with the length of the header (little endian), the header as JSON, the data.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from dials_jax.errors import InputError, require
from dials_jax.files import read_json

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
PLAIN_NAME = re.compile(r"[^/\\\0]{1,200}\.safetensors")
# The other dtypes of the format are smaller than a byte.
SAFETENSORS_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def open_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Returns every tensor of a checkpoint by name. All headers are checked, no data is read.

    Raises: InputError if a shard is missing, damaged or differs from the index.
    """
    index = folder / INDEX_FILE
    if not index.is_file():
        _require_single(folder)
        return open_safetensors(folder / SINGLE_FILE)
    weight_map = read_json(index).get("weight_map")
    require(isinstance(weight_map, dict), f"{index} has no weight_map; download it again")
    for name, shard in weight_map.items():
        require(
            isinstance(shard, str) and PLAIN_NAME.fullmatch(shard) is not None,
            f"{index}: the shard of {name!r}, {shard!r}, is not a plain file name of safetensors; "
            "download it again",
        )
    tensors: dict[str, np.ndarray] = {}
    for shard in sorted(set(weight_map.values())):
        opened = open_safetensors(folder / shard)
        for name in opened:
            require(
                weight_map.get(name) == shard,
                f"{folder / shard} holds {name!r}, which {INDEX_FILE} does not place there; "
                "download the checkpoint again",
            )
        tensors |= opened
    for name, shard in weight_map.items():
        require(
            name in tensors, f"{folder / shard} lacks {name!r}, which {INDEX_FILE} places there"
        )
    return tensors


def _require_single(folder: Path) -> None:
    """Raises: InputError for a folder with neither an index nor the single file of small models."""
    if (folder / SINGLE_FILE).is_file():
        return
    shards = sorted(file.name for file in folder.glob("*.safetensors"))
    require(
        not shards,
        f"{folder} holds {', '.join(shards[:1])} but no {INDEX_FILE}, which says what each "
        "file holds; download it, too",
    )
    raise InputError(
        f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}; only safetensors can be read"
    )


def open_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Returns views of the tensors in one file, by name.

    Raises: InputError if the file is missing or breaks the format: too short or too long, tensors
      that overlap or leave gaps, an entry without dtype, shape or offsets.
    """
    require(path.is_file(), f"{path} is missing; download it again")
    try:
        with safe_open(path, framework="numpy"):
            pass
        header, _, start = _read_header(path)
    except (SafetensorError, ValueError) as error:
        raise InputError(f"{path} {_reason(path, error)}; download it again") from error
    data = np.asarray(np.memmap(path, np.uint8, mode="r"))[start:]
    return {name: _tensor_view(path, name, entry, data) for name, entry in header.items()}


def read_metadata(path: Path) -> dict[str, str]:
    """Returns the texts in the header of a file that `open_safetensors` has checked."""
    return _read_header(path)[1]


def _read_header(path: Path) -> tuple[dict[str, Any], dict[str, str], int]:
    """Returns the entries by name, the metadata, and the byte where the data begins."""

    def to_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):  # the package would take the last of two equal names
            raise ValueError("a key stands twice in one object")
        return values

    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length), object_pairs_hook=to_dict)
    about = header.pop("__metadata__", None) or {}
    return header, about, 8 + length


def _reason(path: Path, error: Exception) -> str:
    """Returns the message about a file that breaks the format."""
    text = str(error).removeprefix("Error while deserializing header: ").partition("\n")[0]
    if "not fully covered" not in text:
        return f"has an unreadable safetensors header ({text})"
    header, _, start = _read_header(path)
    end = start + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    return f"has {path.stat().st_size} bytes and its header promises {end}"


def _tensor_view(path: Path, name: str, entry: dict[str, Any], data: np.ndarray) -> np.ndarray:
    dtype, (begin, end) = entry["dtype"], entry["data_offsets"]
    require(
        dtype in SAFETENSORS_DTYPES,
        f"{path}: {name!r} is {dtype}, which is not supported; take a checkpoint in BF16 or F32",
    )
    return data[begin:end].view(SAFETENSORS_DTYPES[dtype]).reshape(entry["shape"])
