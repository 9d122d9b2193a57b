"""Checkpoints of a training state that are verified before older ones go.

`checkpoints/00001000/` holds the arrays (Orbax) and `digest.json`, written last. A folder without
it is an unfinished save. Orbax loads a flipped bit in silence, hence the digests.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from dials_jax import trees
from dials_jax.config import InputError, read_json, write_json

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run, newest last; every process makes the same calls."""

    def __init__(self, folder: str | Path, keep: int = 2):
        self.folder = Path(folder).absolute()
        self.keep = keep

    def steps(self) -> list[int]:
        """Steps with a finished checkpoint, ascending."""
        return sorted(int(p.parent.name) for p in self.folder.glob("[0-9]*/digest.json"))

    def save(self, step: int, state: PyTree) -> None:
        """Writes, reads back, compares, and only then removes what is older than `keep` saves.

        Raises: OSError if what was read back differs from what was written.
        """
        final = self.folder / f"{step:08d}"
        partial = self.folder / f"{step:08d}.partial"
        if step in self.steps():
            return
        _once(lambda: [shutil.rmtree(p, ignore_errors=True) for p in (partial, final)])
        flat = flatten(state)
        ocp.save_pytree(partial / "state", flat)
        digests = trees.digest_hex(flat)
        if trees.digest_hex(_load(partial, flat)) != digests:
            raise OSError(f"checkpoint {partial} reads back differently; the storage is failing")
        _once(lambda: (partial.rename(final), write_json(final / "digest.json", digests)))
        _once(self._prune)

    def restore(self, state: PyTree) -> PyTree | None:
        """The newest checkpoint whose digests match, shaped and placed like `state`, or None.

        Raises: InputError if there are checkpoints but none is intact.
        """
        steps = self.steps()
        flat = flatten(state)
        for step in reversed(steps):
            folder = self.folder / f"{step:08d}"
            try:
                loaded = _load(folder, flat)
                if trees.digest_hex(loaded) == read_json(folder / "digest.json"):
                    return unflatten(state, loaded)
                problem = "its arrays do not match their digests"
            except Exception as error:  # Orbax raises many kinds for damaged files
                problem = str(error).splitlines()[0]
            log.warning("checkpoint %s is damaged (%s); trying an older one", folder, problem)
        if steps:
            raise InputError(f"no checkpoint in {self.folder} is intact; remove it to start again")
        return None

    def _prune(self) -> None:
        for step in self.steps()[: -self.keep]:
            shutil.rmtree(self.folder / f"{step:08d}")


def flatten(tree: PyTree) -> dict[str, Any]:
    """Leaves by name: what is stored does not depend on the classes that hold the arrays."""
    return {name.replace("/", "."): leaf for name, leaf in trees.named_leaves(tree)}


def unflatten(like: PyTree, flat: dict[str, Any]) -> PyTree:
    return trees.map_named(lambda name, _: flat[name.replace("/", ".")], like)


def _load(folder: Path, flat: dict[str, jax.Array]) -> dict[str, jax.Array]:
    abstract = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        for name, x in flat.items()
    }
    return ocp.load_pytree(folder / "state", abstract)


def _once(action: Any) -> None:
    """Runs on one process while the others wait."""
    if jax.process_index() == 0:
        action()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("checkpoint")
