"""Checkpoints of a training state that are verified before older ones go.

`checkpoints/00001000/` holds the arrays (Orbax) and `digest.json`. It is written as
`00001000.partial` and renamed when it is whole. Orbax loads a flipped bit in silence, hence the
digests.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from dials_jax import trees
from dials_jax.config import InputError, read_json, write_json
from dials_jax.sharding import on_first_process

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run, newest last; every process makes the same calls."""

    def __init__(self, folder: str | Path, keep: int = 2):
        self.folder = Path(folder).absolute()
        self.keep = keep

    def steps(self) -> list[int]:
        """Steps with a finished checkpoint, ascending."""
        found = self.folder.glob("*/digest.json")
        return sorted(int(p.parent.name) for p in found if p.parent.name.isdecimal())

    def save(self, step: int, state: PyTree) -> None:
        """Writes, reads back, compares, and only then removes all but the `keep` newest.

        Raises: OSError if what was read back differs from what was written.
        """
        final = self.folder / f"{step:08d}"
        partial = self.folder / f"{step:08d}.partial"
        on_first_process(self._remove_partial)
        flat = flatten(state)
        ocp.save(partial / "state", flat)
        digests = trees.digest_hex(flat)
        if trees.digest_hex(_load(partial, flat)) != digests:
            raise OSError(f"checkpoint {partial} reads back differently; the storage is failing")

        def finish():
            write_json(partial / "digest.json", digests)
            shutil.rmtree(final, ignore_errors=True)  # a damaged one, whose step was run again
            partial.rename(final)
            self._prune(step)

        on_first_process(finish)

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
            except (jax.errors.JaxRuntimeError, MemoryError):
                raise  # no room for it, which says nothing of the files
            except Exception as error:  # Orbax raises many kinds for damaged files
                problem = (str(error).splitlines() or [type(error).__name__])[0]
            log.warning("checkpoint %s is damaged (%s); trying an older one", folder, problem)
        if steps:
            raise InputError(f"no checkpoint in {self.folder} is intact; remove it to start again")
        return None

    def _remove_partial(self) -> None:
        """What stopped saves left, of any step: a continued run may save at others."""
        for folder in self.folder.glob("*.partial"):
            shutil.rmtree(folder, ignore_errors=True)

    def _prune(self, newest: int) -> None:
        """Later checkpoints than `newest` were found damaged: training went on before them."""
        steps = self.steps()
        kept = [step for step in steps if step <= newest][-self.keep :]
        for step in set(steps) - set(kept):
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
    return ocp.load(folder / "state", abstract)
