"""Checkpoints of a training state, verified before older ones are removed.

`checkpoints/00001000/` holds the arrays (Orbax) and `digest.json`, and where a signal came between
two lines of the log, `window.json`. It is written as `00001000.partial` and renamed when it is
complete. A thread writes while training goes on.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from dials_jax import digests, trees
from dials_jax.errors import InputError, require
from dials_jax.files import read_json, write_json
from dials_jax.meeting import Meeting
from dials_jax.records import require_sound
from dials_jax.stored import UnreadableTree, load_tree, save_tree, writing
from dials_jax.training.host_copy import begin_copy
from dials_jax.training.losses import Mean, Metrics

log = logging.getLogger(__name__)
WINDOW = "window.json"  # the metrics of each step since the last line of the log
_numbers = itertools.count()  # of saves: all processes begin the same ones


class Checkpoints:
    """The checkpoints of one run. Every process has to make the same calls.

    As a context it waits at its end for a save that is under way.

    Args:
      keep: the number of checkpoints to keep.

    Attributes:
      window: what was saved as `window` with the state that `restore` has returned.
    """

    def __init__(self, folder: str | Path, keep: int = 2):
        self.folder = Path(folder).absolute()
        self.keep = keep
        self.window: list[Metrics] = []
        self._damaged: set[int] = set()  # found so by `restore`
        self._writer = futures.ThreadPoolExecutor(1, "checkpoint")
        self._saving: futures.Future[None] | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        try:
            self.wait()
        except Exception as other:
            if error is None:
                raise
            log.error("%s", other)  # beside what has ended the run
        finally:
            self._writer.shutdown()

    def steps(self) -> list[int]:
        """Returns the steps of finished checkpoints, ascending.

        Raises: InputError if the folder cannot be read.
        """
        with _readable(self.folder):
            return sorted(
                int(p.name) for p in self._own_names() if p.name.isdecimal() and _is_finished(p)
            )

    def require_own(self) -> None:
        """Raises: InputError for a folder with a checkpoint's name that `save` did not make."""
        with _readable(self.folder):
            foreign = [path for path in self._own_names() if not _made_by_a_save(path)]
        require(
            not foreign,
            f"{foreign and foreign[0]} is no checkpoint and would be overwritten; move it away",
        )

    def _own_names(self) -> list[Path]:
        if not self.folder.exists():
            return []
        return [p for p in self.folder.iterdir() if re.fullmatch(r"\d+(\.partial)?", p.name)]

    def save(self, step: int, state: PyTree, window: Sequence[Metrics] = ()) -> None:
        """Begins to write a checkpoint; `wait` ends it. The state may be donated afterwards.

        It is written, read back and compared, and only then are the older ones removed. A thread
        does so with a copy in the host's memory. Where that is not possible (`begin_copy`) the
        call waits for it.

        Args:
          window: the metrics of the steps that no line of the log is of yet.
        Raises: what `wait` raises, of this save or of the one before.
        """
        self.wait()
        flat, meeting = flatten(state), Meeting(f"checkpoint {next(_numbers)}")
        with meeting.telling():
            sums, copied = digests.digest(flat), begin_copy(flat)
            notes = {WINDOW: _plain(window)} if window else {}
            if copied is None:
                self._write(step, flat, sums, notes, digests.digest_hex, meeting)
                return

        def write():
            with meeting.telling():
                self._write(step, copied(), sums, notes, _digests_of_bytes, meeting)

        self._saving = self._writer.submit(write)

    def wait(self, unless_at_work: bool = False) -> None:
        """Ends the save that has begun, if any. Afterwards its checkpoint has its name.

        Args:
          unless_at_work: return at once if it is still being written, and no process has failed.
        Raises, once:
          InputError: if it cannot be written; the older ones stay.
          OSError: if what was read back differs from what was written.
        """
        saving = self._saving
        if saving is None or (unless_at_work and _is_well_everywhere(saving)):
            return
        futures.wait([saving])
        self._saving = None
        saving.result()
        if unless_at_work:
            raise InputError("another process could not save; its message says why")

    def _write(
        self,
        step: int,
        flat: dict[str, jax.Array],
        sums: dict[str, jax.Array],
        notes: dict[str, dict[str, Any]],
        digest: Callable[[PyTree], Any],
        meeting: Meeting,
    ) -> None:
        """Args: sums: the state's digest. notes: other files. digest: of `flat`, and read back."""
        final = self.folder / f"{step:08d}"
        partial = self.folder / f"{step:08d}.partial"
        rest = "older checkpoints stay; make room and run the same command again"
        meeting.on_first_process(self._remove_partial)
        try:
            save_tree(partial / "state", flat, rest, meeting=meeting)
            problem = None
            try:
                load_tree(partial / "state", flat, digest(flat), digest, meeting)
            except UnreadableTree as error:
                problem = OSError(
                    f"checkpoint {partial} reads back differently ({error}); the storage fails"
                )
                problem.__cause__ = error
            meeting.agree(problem)
            with writing(partial, rest):
                # The digests last: their file says that all is there.
                files = notes | {"digest.json": digests.as_hex(sums)}
                meeting.on_first_process(lambda: _write_notes(partial, files))
        except Exception:
            meeting.fail()  # before what others write is removed
            if jax.process_index() == 0:
                self._remove_partial()  # its disk space is needed
            raise

        def finish():
            if final.exists():  # a damaged one, whose step was run again
                _remove_finished(final)
            partial.rename(final)
            self._damaged.discard(step)
            self._prune(step)

        meeting.on_first_process(finish)
        meeting.close()

    def restore(self, state: PyTree, *layouts: PyTree) -> PyTree | None:
        """Loads the newest checkpoint whose digests match; None if there is no checkpoint.

        Args:
          state: arrays, or their shapes, dtypes and shardings, which the result has, too.
          layouts: other layouts of the same values; a checkpoint stored in one is returned in it.
        Raises: InputError if a checkpoint cannot be read, or if there are some and none is intact.
        """
        steps = self.steps()
        likes = {frozenset(flatten(like)): like for like in (*layouts, state)}
        for step in reversed(steps):
            folder = self.folder / f"{step:08d}"
            try:
                expected = read_json(folder / "digest.json")
                window = _read_window(folder / WINDOW)
                like = likes.get(frozenset(expected), state)
                loaded = load_tree(folder / "state", flatten(like), expected)
                self.window = window
                return unflatten(like, loaded)
            except (InputError, UnreadableTree) as error:
                _require_readable(folder)
                log.warning("checkpoint %s is damaged (%s); trying an older one", folder, error)
                self._damaged.add(step)
        require(
            not steps,
            f"no checkpoint in {self.folder} is intact; bring back a copy, or choose another "
            "--workdir to start again",
        )
        return None

    def _remove_partial(self) -> None:
        """Removes unfinished checkpoints of all steps: a continued run may save at other steps."""
        for folder in self.folder.glob("*.partial"):
            if _made_by_a_save(folder):
                _remove(folder)

    def _prune(self, newest: int) -> None:
        """Removes checkpoints older than the `keep` newest good ones.

        Checkpoints later than `newest` are not touched: they were found damaged, and training
        continued from before them.
        """
        good = [s for s in self.steps() if s <= newest and s not in self._damaged]
        for step in self.steps():
            if step < good[-self.keep :][0]:
                _remove_finished(self.folder / f"{step:08d}")


def _is_well_everywhere(saving: futures.Future[None]) -> bool:
    """Whether no process has failed to save yet. All ask at the same time; the answer is one."""
    failed = saving.done() and saving.exception() is not None
    if jax.process_count() > 1:
        failed = multihost_utils.process_allgather(np.array(failed)).any()
    return not failed


def _digests_of_bytes(flat: dict[str, jax.Array]) -> dict[str, str]:
    """Of what this process has of arrays on the host. Unlike `digests.digest` it is not compiled,
    nor run on a device."""

    def one(x: jax.Array) -> str:
        found = hashlib.sha256()
        for shard in x.addressable_shards:
            found.update(np.asarray(shard.data).reshape(-1).view(np.uint8))
        return found.hexdigest()

    return {name: one(x) for name, x in flat.items()}


def _remove_finished(folder: Path) -> None:
    """Its digests first: what is left of it never looks complete."""
    (folder / "digest.json").unlink(missing_ok=True)
    shutil.rmtree(folder)


def _remove(folder: Path) -> None:
    """Removes a folder in which threads of a save that failed may still write, for two seconds."""
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns an OSError into an InputError: a file that cannot be read is not a damaged one."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{error.filename or path} cannot be read ({error.strerror or error}); nothing was "
            "changed: make it readable and run the same command again"
        ) from error


def _require_readable(folder: Path) -> None:
    """Raises: InputError if a byte of the folder cannot be read."""

    def stop(error: OSError):
        raise error

    with _readable(folder):
        for inside, _, names in os.walk(folder, onerror=stop):
            for name in names:
                with Path(inside, name).open("rb") as file:
                    while file.read(2**24):
                        pass


def _is_finished(folder: Path) -> bool:
    """Whether the checkpoint is complete: its digests are written last. Raises: OSError."""
    return (folder / "digest.json").exists()


def _made_by_a_save(folder: Path) -> bool:
    """Whether a folder holds only files that a save writes, complete or not."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    ours = ("state", "digest.json", WINDOW)
    return all(path.name.startswith(ours) for path in folder.iterdir())


def _plain(window: Sequence[Metrics]) -> dict[str, Any]:
    """Metrics of steps as JSON, which holds float32 exactly. The host waits for the steps."""
    return {"steps": jax.tree.map(float, jax.device_get(list(window)))}


def _write_notes(folder: Path, notes: dict[str, dict[str, Any]]) -> None:
    for name, values in notes.items():
        write_json(folder / name, values, digest=name == WINDOW)


def _read_window(path: Path) -> list[Metrics]:
    """The metrics of steps that no line is of; none where every step that is saved has its line.

    Raises: InputError for a damaged file.
    """
    if not path.exists():
        return []
    with require_sound(path, "an older checkpoint is used"):
        return [
            {name: Mean(float(total), float(count)) for name, (total, count) in step.items()}
            for step in read_json(path)["steps"]
        ]


def flatten(tree: PyTree) -> dict[str, Any]:
    """Returns the leaves by name, so that what is stored does not depend on classes."""
    return {name.replace("/", "."): leaf for name, leaf in trees.named_leaves(tree)}


def unflatten(like: PyTree, flat: dict[str, Any]) -> PyTree:
    return trees.map_named(lambda name, _: flat[name.replace("/", ".")], like)
