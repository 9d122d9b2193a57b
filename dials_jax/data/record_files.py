"""Reads the records of a task from JSON lines, Parquet, or a folder of tensorflow-datasets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dials_jax.data.records import JSON_LINES_SUFFIXES, expand_paths, read_jsonl
from dials_jax.errors import InputError, require, require_packages

PARQUET_SUFFIX = ".parquet"
ROWS = 1024  # of a Parquet file, read at a time
TFDS_FILE = "dataset_info.json"  # in every folder that tensorflow-datasets has prepared


def read_task_records(paths: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields ("path:line", record) of all files in `paths`; lines and rows count from 1.

    Args:
      paths: files, folders of them, and "FOLDER:SPLIT" for a folder of tensorflow-datasets.

    Raises: InputError for a file that cannot be read, naming the first bad line.
    """
    paths = list(paths)
    require(bool(paths), "paths is empty; name at least one file or folder")
    for path in paths:
        folder, _, split = path.rpartition(":")
        if (Path(path) / TFDS_FILE).is_file():
            folder, split = path, ""
        if (Path(folder) / TFDS_FILE).is_file():
            yield from _read_prepared(Path(folder), split)
            continue
        for file in expand_paths((path,), (*JSON_LINES_SUFFIXES, PARQUET_SUFFIX)):
            rows = _read_parquet(file) if file.suffix == PARQUET_SUFFIX else read_jsonl(file)
            for number, record in rows:
                yield f"{file}:{number}", record


def _read_parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    require_packages("data", "pyarrow")
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=ROWS):
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}:{number + 1}: {reason}; mend or replace the file") from error


# ----------------------------------------------------------------------------- tensorflow-datasets


def _read_prepared(folder: Path, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Reads without TensorFlow, which only the format ArrayRecord allows.

    Classes stay numbers, as the files hold them.
    """
    require_packages("data", "tensorflow_datasets", "array_record", "importlib_resources")
    source = _open_prepared(folder, split)
    for index in range(len(source)):
        yield f"{folder}:{split}:{index + 1}", _plain(_read_prepared_record(source, index, folder))


def _read_prepared_record(source: Any, index: int, folder: Path) -> Any:
    try:
        return source[index]
    except Exception as error:  # the package raises nothing more precise
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{folder}: record {index + 1} of {len(source)} cannot be read ({reason}); prepare the "
            "data set again"
        ) from error


def _open_prepared(folder: Path, split: str) -> Any:
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(folder)
    except Exception as error:  # the package raises nothing more precise
        raise InputError(f"{folder} cannot be read: {error}; prepare it again") from error
    splits = builder.info.splits
    require(
        split in splits,
        f"{folder} has no split {split!r}; put one behind the path: "
        + ", ".join(f"{folder}:{name}" for name in sorted(splits)),
    )
    layout = str(getattr(builder.info.file_format, "value", builder.info.file_format))
    require(
        layout == "array_record",
        f"{folder} is in the format {layout}, which needs TensorFlow; prepare the data set again "
        "with file_format='array_record'",
    )
    source = builder.as_data_source(split=split)
    if len(source):  # a number that the folder states; the last ones may not be there
        _read_prepared_record(source, len(source) - 1, folder)
    return source


def _plain(value: Any) -> Any:
    """As JSON has it: text for bytes, lists for arrays, Python's numbers for NumPy's."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
        return _plain(value) if isinstance(value, list | bytes) else value
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value
