"""Writes safetensors files one tensor at a time.

The package `safetensors` writes a file from all of its tensors, which it copies: twice the size of
a file in memory. The header depends on shapes only, so here a tensor is made when its turn comes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np

from dials_jax.convert.safetensors_reader import INDEX_FILE, SAFETENSORS_DTYPES, SINGLE_FILE
from dials_jax.files import write_json

DTYPE_NAMES = {np.dtype(dtype): name for name, dtype in SAFETENSORS_DTYPES.items()}
Shapes = Mapping[str, jax.ShapeDtypeStruct]
Named = Iterable[tuple[str, np.ndarray]]


def write_shards(folder: Path, shapes: Shapes, tensors: Named, shard_bytes: int) -> None:
    """Writes a checkpoint: one file, or several with an index, as transformers names them.

    Args:
      shapes: of all tensors, in the order in which `tensors` yields them.
      shard_bytes: most bytes of a file; a larger tensor has a file of its own.
    """
    shards, coming = split_shards(shapes, shard_bytes), iter(tensors)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    names = names if len(names) > 1 else [SINGLE_FILE]
    for name, shard in zip(names, shards, strict=True):
        with (folder / name).open("wb") as file:
            write_safetensors(file, shard, coming, {"format": "pt"})
            file.flush()
            os.fsync(file.fileno())
    if len(names) > 1:
        places = {t: name for name, shard in zip(names, shards, strict=True) for t in shard}
        total = sum(map(num_bytes, shapes.values()))
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": places})


def split_shards(shapes: Shapes, shard_bytes: int) -> list[Shapes]:
    """Fills one file after the other, in order."""
    shards: list[dict[str, Any]] = [{}]
    size = 0
    for name, x in shapes.items():
        if shards[-1] and size + num_bytes(x) > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = x
        size += num_bytes(x)
    return shards


def num_bytes(x: jax.ShapeDtypeStruct) -> int:
    return x.size * x.dtype.itemsize


def write_safetensors(
    file: BinaryIO, shapes: Shapes, tensors: Iterator[tuple[str, np.ndarray]], about: dict[str, str]
) -> None:
    """Writes one file, taking as many tensors as there are shapes.

    Args:
      about: texts in the header, under `__metadata__`.
    """
    header, end = {"__metadata__": about}, 0
    for name, x in shapes.items():
        begin, end = end, end + num_bytes(x)
        dtype, shape = DTYPE_NAMES[np.dtype(x.dtype)], list(x.shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8, as the package has it
    file.write(len(text).to_bytes(8, "little") + text)
    for expected, shape in shapes.items():
        name, x = next(tensors)
        assert (name, x.shape, x.dtype) == (expected, shape.shape, shape.dtype), (name, expected)
        file.write(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)
        del x  # before the next one is made
