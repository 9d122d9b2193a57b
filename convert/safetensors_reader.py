"""Reads safetensors files as memory-mapped arrays.

The `safetensors` package cannot give bfloat16 to numpy, and its arrays are copies. Here a tensor
is a view of the mapped file: it costs no memory until it is read.

Format: 8 bytes with the length of the header (little endian), the header as JSON, the data.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from dials_jax.config import InputError, read_json, require

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


def open_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint, under its name. All headers are checked, no data is read.

    Raises: InputError if a shard is missing, truncated or not what the index says.
    """
    index = folder / INDEX
    if not index.is_file():
        require(
            (folder / SINGLE).is_file(),
            f"{folder} holds neither {SINGLE} nor {INDEX}; only safetensors can be read",
        )
        return open_file(folder / SINGLE)
    weight_map = read_json(index).get("weight_map")
    require(isinstance(weight_map, dict), f"{index} has no weight_map; download it again")
    tensors: dict[str, np.ndarray] = {}
    for shard in sorted(set(weight_map.values())):
        require(Path(shard).name == shard, f"{index}: shard {shard!r} is not a plain file name")
        opened = open_file(folder / shard)
        for name in opened:
            require(
                weight_map.get(name) == shard,
                f"{folder / shard} holds {name!r}, which {INDEX} does not place there; "
                "download the checkpoint again",
            )
        tensors |= opened
    for name, shard in weight_map.items():
        require(name in tensors, f"{folder / shard} lacks {name!r}, which {INDEX} places there")
    return tensors


def open_file(path: Path) -> dict[str, np.ndarray]:
    """Views of the tensors in one file."""
    require(path.is_file(), f"{path} is missing; download it again")
    entries, start = _read_header(path)
    size, end = path.stat().st_size, start + max((e.end for e in entries.values()), default=0)
    require(
        size == end,
        f"{path} has {size} bytes and its header promises {end}; download it again",
    )
    data = np.asarray(np.memmap(path, np.uint8, mode="r"))[start:]
    return {name: _view(path, name, entry, data) for name, entry in entries.items()}


class _Entry(NamedTuple):
    """What the header says about one tensor; offsets in bytes, from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def _read_header(path: Path) -> tuple[dict[str, _Entry], int]:
    """The entries by name, and the byte where the data begins."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if 8 + length > path.stat().st_size:
                raise ValueError("the header ends beyond the file")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        entries = {
            name: _Entry(e["dtype"], tuple(map(int, e["shape"])), *map(int, e["data_offsets"]))
            for name, e in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: unreadable safetensors header; download it again") from error
    return entries, 8 + length


def _view(path: Path, name: str, entry: _Entry, data: np.ndarray) -> np.ndarray:
    kinds = ", ".join(DTYPES)
    require(entry.dtype in DTYPES, f"{path}: {name!r} is {entry.dtype}; weights must be {kinds}")
    dtype = np.dtype(DTYPES[entry.dtype])
    require(
        0 <= entry.begin and entry.end - entry.begin == math.prod(entry.shape) * dtype.itemsize,
        f"{path}: {name!r} of shape {entry.shape} does not fill bytes {entry.begin} to "
        f"{entry.end}; download it again",
    )
    return data[entry.begin : entry.end].view(dtype).reshape(entry.shape)
