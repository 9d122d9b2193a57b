"""Trees of arrays on disk, compared with their digests when they are read; folders that are whole.

Orbax writes and reads arrays. It loads a flipped bit silently, and raises errors of many kinds.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from dials_jax import digests, sharding
from dials_jax.errors import InputError, require
from dials_jax.meeting import Meeting

# Out of memory, for example, which says nothing about the files.
OF_THE_DEVICE = (MemoryError, jax.errors.JaxRuntimeError)

# Orbax tells the steps of an operation apart by a number of the process, so that two operations at
# once get into each other's folders: a checkpoint's thread and the export of a model.
ORBAX = threading.Lock()

MARK = "UNFINISHED"  # a file in a folder that is being written


class UnreadableTree(Exception):
    """Stored arrays cannot be read, or are damaged; the message is the reason."""


def save_tree(
    folder: Path,
    tree: PyTree,
    rest: str,
    chunk_bytes: int | None = None,
    meeting: Meeting | None = None,
) -> None:
    """Writes a folder of arrays in place of what has its name; every process calls this.

    Args:
      rest: what remains if it fails, and what to do.
      chunk_bytes: size of the pieces that an array is stored in; None: one for each shard.
      meeting: where several processes meet; None: by programs on their devices.
    Raises: InputError if it cannot be written.
    """
    on_first_process = sharding.on_first_process if meeting is None else meeting.on_first_process
    context = ocp.Context()
    context.array.saving.storage_options.chunk_byte_size = chunk_bytes
    # Who loads says where the arrays go, so a file of where they were is never read.
    context.array.saving.enable_write_sharding_file = False
    with writing(folder, rest), context:
        on_first_process(lambda: _make_way(folder))
        with _orbax_at(meeting):
            ocp.save(folder, tree)


def _make_way(folder: Path) -> None:
    """Removes what has the name, and sees that a folder can get it.

    Orbax's own `overwrite` can hang: a process that looks for the old folder after another has
    removed it does not wait where the other waits for it. And where Orbax cannot make a folder, its
    threads wait five minutes for it, and the process cannot end before they do.
    """
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    folder.rmdir()


@functools.cache
def _what_waits() -> tuple[tuple[Any, str], tuple[Any, str]] | None:
    """The functions of Orbax by which several processes wait for each other; None: of a version
    with which saves in a thread were not tried.

    The first compares the folder's name on all processes, by programs on all devices even if
    `active_processes` is given. The second waits at JAX's coordinator if it is given, with a limit
    of five minutes, which it waits in full if a process has failed.
    """
    if not version("orbax-checkpoint").startswith("0.12."):
        return None
    try:
        from orbax.checkpoint.experimental.v1._src.saving import execution
        from orbax.checkpoint.experimental.v1._src.synchronization import multihost
    except ImportError:
        return None
    found = (execution, "_check_directory_consistency"), (multihost, "sync_global_processes")
    return found if all(hasattr(*each) for each in found) else None


def saves_without_devices() -> bool:
    """Whether this version of Orbax saves at a `Meeting`."""
    return _what_waits() is not None


@contextlib.contextmanager
def _orbax_at(meeting: Meeting | None) -> Iterator[None]:
    """Orbax, which does one thing at a time. Its processes wait for each other at the meeting."""

    async def wait(key: str, *, operation_id: str, **_) -> None:
        await asyncio.to_thread(meeting.wait, f"{operation_id} {key}")

    with contextlib.ExitStack() as stack:
        stack.enter_context(ORBAX)
        if meeting is not None and jax.process_count() > 1 and saves_without_devices():
            compare, wait_for_all = _what_waits()
            stack.enter_context(_replaced(*compare, lambda directory: None))
            stack.enter_context(_replaced(*wait_for_all, wait))
        yield


@contextlib.contextmanager
def _replaced(module: Any, name: str, function: Callable) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, function)
    try:
        yield
    finally:
        setattr(module, name, before)


def load_tree(
    folder: Path,
    like: PyTree,
    expected: Any,
    digest: Callable[[PyTree], Any] = digests.digest_hex,
    meeting: Meeting | None = None,
) -> PyTree:
    """Reads a folder of arrays, each directly to its devices.

    Args:
      like: arrays of the same shapes, dtypes and shardings, or `jax.ShapeDtypeStruct`s.
      expected: what `digest` gave of the arrays that were saved.
      meeting: as `save_tree` takes it.
    Raises: UnreadableTree for arrays that are missing, damaged or of other shapes. Errors of
      missing memory are passed on.
    """
    try:
        tree = _read(folder, like, meeting)
    except (InputError, *OF_THE_DEVICE):
        raise
    except Exception as error:
        raise UnreadableTree(_reason(error)) from error
    if digest(tree) != expected:
        raise UnreadableTree("its arrays are damaged: they do not match their digests")
    return tree


def _read(folder: Path, like: PyTree, meeting: Meeting | None) -> PyTree:
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
    )
    with _orbax_at(meeting):
        return ocp.load(folder, abstract)


@contextlib.contextmanager
def writing(path: Path, rest: str) -> Iterator[None]:
    """Turns errors of writing `path`, such as a full disk, into one line.

    Args:
      rest: what remains, and what to do.
    Raises: InputError with the reason. Errors of missing memory are passed on.
    """
    logging.getLogger("absl").addFilter(_is_news)  # adding it again changes nothing
    try:
        yield
    except (InputError, *OF_THE_DEVICE):
        raise
    except Exception as error:
        raise InputError(f"{path} could not be written ({_reason(error)}); {rest}") from error


@contextlib.contextmanager
def new_folder(folder: Path, rest: str) -> Iterator[Path]:
    """A folder to write into, which gets the name `folder`, or replaces it, once it is whole.

    What is left by a process that stopped has another name and a mark; the next one removes it.
    Every process calls this.
    """
    unfinished = unfinished_name(folder)

    def begin():
        if unfinished.exists():
            shutil.rmtree(unfinished)
        unfinished.mkdir(parents=True)
        (unfinished / MARK).write_text("left by a save that was stopped; the next one removes it\n")

    def finish():
        if folder.exists():
            shutil.rmtree(folder)
        unfinished.rename(folder)  # with the mark: whatever has the other name may be removed
        (folder / MARK).unlink()

    with writing(unfinished, rest):
        sharding.on_first_process(begin)
    yield unfinished
    with writing(unfinished, rest):
        sharding.on_first_process(finish)


def unfinished_name(folder: Path) -> Path:
    return folder.with_name(folder.name + ".unfinished")


def require_new(folder: Path) -> None:
    """Raises: InputError where `new_folder` would replace or remove anything but its own, or where
    no folder can be made."""
    require_parent(folder)
    require(not os.path.lexists(folder), f"{folder} exists; name another folder")
    left = unfinished_name(folder)
    own = is_empty(left) or (not left.is_symlink() and (left / MARK).is_file())
    require(
        not os.path.lexists(left) or own,
        f"{left} was not left by a save that was stopped, and would be removed; move it away",
    )


def require_parent(path: Path) -> None:
    """Raises: InputError for an absolute path in which a file stands where a folder has to."""
    parent = next(one for one in path.parents if os.path.lexists(one))
    require(parent.is_dir(), f"{path} cannot be made: {parent} is no folder; name another one")


def is_empty(folder: Path) -> bool:
    return not folder.is_symlink() and folder.is_dir() and not any(folder.iterdir())


def require_space(folder: Path, needed: int) -> None:
    """Raises: InputError if the disk has fewer free bytes than are needed."""
    existing = next(p for p in folder.parents if p.exists())
    free = shutil.disk_usage(existing).free
    require(
        free >= needed,
        f"{existing} has {free / 1e9:.1f} GB free and the weights need {needed / 1e9:.1f} GB; "
        "make room or name another folder",
    )


def _is_news(record: logging.LogRecord) -> bool:
    """Orbax logs the traceback of every thread that fails, some late, besides raising."""
    return "_SignalingThread" not in record.getMessage()


def _reason(error: Exception) -> str:
    """An error in one line; Orbax wraps the cause in a bare Exception."""
    reason = getattr(error, "strerror", None) or str(error.__cause__ or error)
    return " ".join(reason.split())[:300] or type(error).__name__
