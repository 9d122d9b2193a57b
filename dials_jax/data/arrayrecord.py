"""Rows as ArrayRecord: written by a tensorflow-datasets builder, read through Grain.

Neither needs TensorFlow. The other formats of tensorflow-datasets do not serve: tfrecord, its
default, needs TensorFlow, and its parquet silently loses examples.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Integer

from dials_jax.data.text import RowStore
from dials_jax.errors import InputError, require
from dials_jax.files import read_json

# importlib_resources is a dependency of tensorflow-datasets that it does not declare.
GRAIN_PACKAGES = ("array_record", "grain", "tensorflow_datasets", "importlib_resources")


def missing_grain_packages() -> list[str]:
    """Returns the names of the packages for ArrayRecord that are not installed."""
    return [name for name in GRAIN_PACKAGES if importlib.util.find_spec(name) is None]


class ArrayRecordRows:
    """The rows of one split of a folder that `write_array_record` made (a RowStore).

    Raises: InputError, in one line, whenever the folder cannot be read.
    """

    def __init__(self, folder: Path, split: str):
        import grain
        import tensorflow_datasets as tfds

        _require_known_features(folder)
        self.folder = folder
        with self._as_input_error():
            records = tfds.builder_from_directory(folder).as_data_source(split)
        self.records = grain.MapDataset.source(records)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, indices: Int[np.ndarray, "B"]) -> Integer[np.ndarray, "B T"]:
        with self._as_input_error():  # the format has hashes: damaged data is never read as rows
            return np.stack([self.records[int(i)]["tokens"] for i in indices])

    @contextlib.contextmanager
    def _as_input_error(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the packages raise nothing more precise
            reason = " ".join(str(error).split())[:100]
            raise InputError(
                f"{self.folder} cannot be read ({type(error).__name__}: {reason}); delete the "
                'folder and run prepare.py again, or set reader="numpy"'
            ) from error


def _require_known_features(folder: Path) -> None:
    """Checks that features.json names only classes of tensorflow-datasets.

    The package imports every module that the file names, so another name could run any code.

    Raises: InputError for any other class.
    """
    path, ours = folder / "features.json", r"tensorflow_datasets\.core\.features\.\w+\.\w+"
    for name in _class_names(read_json(path)):
        require(
            re.fullmatch(ours, str(name)) is not None,
            f"{path} names {str(name)[:80]!r}, no class of tensorflow-datasets; delete the folder "
            'and run prepare.py again, or set reader="numpy"',
        )


def _class_names(features: Any) -> Iterator[Any]:
    """Yields the class names at any depth of a features.json."""
    if isinstance(features, list):
        features = dict(enumerate(features))
    for key, value in features.items() if isinstance(features, dict) else ():
        if key in ("pythonClassName", "python_class_name", "type"):
            yield value
        else:
            yield from _class_names(value)


def write_array_record(splits: Mapping[str, RowStore], length: int, folder: Path) -> None:
    """Writes the rows of every split into `folder`, or leaves `folder` as it was.

    Args:
      length: tokens per row.

    Raises: InputError if what is read back has another number of rows, or another first or last
      row.
    """
    # Next to its final name, so that a folder of that name is always whole.
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    builder = _builder(splits, length, temporary)
    # The package announces a download that does not happen, and draws bars into log files.
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare()
    written = Path(builder.data_path)
    for split, rows in splits.items():
        require_equal_ends(ArrayRecordRows(written, split), rows, f"{written}, {split}")
    shutil.rmtree(folder, ignore_errors=True)
    written.rename(folder)
    shutil.rmtree(temporary)


def require_equal_ends(found: RowStore, wanted: RowStore, where: str) -> None:
    """Compares the numbers of rows, the first row and the last row.

    Args:
      where: the folder of `found`, for the message.

    Raises: InputError if they differ.
    """
    ends = np.array([0, len(wanted) - 1])
    if len(found) != len(wanted) or not np.array_equal(found[ends], wanted[ends]):
        raise InputError(
            f"{where} holds {len(found)} rows, or other ones than the {len(wanted)} written; "
            "delete the folder and run prepare.py again"
        )


def _builder(splits: Mapping[str, RowStore], length: int, folder: Path) -> Any:
    """Makes the tensorflow-datasets builder that writes the rows into `folder`."""
    import tensorflow_datasets as tfds
    from tqdm import tqdm

    tfds.disable_progress_bar()
    dtype = next(iter(splits.values()))[np.array([0])].dtype
    # As bytes: the default spells integers out one by one, five times slower.
    row = tfds.features.Tensor(
        shape=(length,), dtype=dtype.type, encoding=tfds.features.Encoding.BYTES
    )

    # Not registered, since a process may define it twice.
    with tfds.core.registered.skip_registration():

        class PackedRows(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                features = tfds.features.FeaturesDict({"tokens": row})
                return tfds.core.DatasetInfo(
                    builder=self,
                    description="Text, tokenised and packed into rows.",
                    features=features,
                    disable_shuffling=True,
                )

            def _split_generators(self, _):
                return {name: self._generate_examples(rows) for name, rows in splits.items()}

            def _generate_examples(self, rows):
                # disable=None: no bar where stderr is a file.
                for i in tqdm(range(len(rows)), "ArrayRecord", unit=" rows", disable=None):
                    yield i, {"tokens": rows[np.array([i])][0]}

        return PackedRows(data_dir=folder, file_format="array_record")
