"""Folders that a run writes into: one process at a time, never over the files of others.

A file of the folder, its mark, says what the folder is for: what the results in it depend on.

with exclusive(workdir) as workdir:
    require_unclaimed(workdir, mark="config.json", names=("model", "checkpoints"))
    old = read_mark(workdir / "config.json")  # None in a new folder
    if old is not None:
        require_same(old, new, workdir, "experiment")
    ...
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dials_jax import digests, sharding
from dials_jax.errors import InputError, require
from dials_jax.files import local_path, read_json, require_writable

log = logging.getLogger(__name__)

LOCK = ".dials_jax.lock"  # in the folder while a process works there
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def exclusive(folder: str | Path, name: str = "--workdir", lock: str = LOCK) -> Iterator[Path]:
    """Locks `folder` for this process, or this pod, and makes it if it is missing.

    The lock is one of the operating system, which releases it when the process ends in any way.
    Every process of a pod calls this; the first one holds the lock. A folder that was made here and
    stays empty is removed.

    Args:
      name: of the option or field that gave the folder, for messages.
      lock: the lock's file; runs that share a folder but no file in it have their own.
    Yields: the folder's absolute path.
    Raises: InputError if another process works there, or if nothing can be written.
    """
    path = local_path(folder, name)
    with contextlib.ExitStack() as stack:
        sharding.on_first_process(lambda: stack.enter_context(_locked(path, name, lock)))
        yield path


@contextlib.contextmanager
def _locked(folder: Path, name: str, lock: str) -> Iterator[None]:
    require_writable(folder, name)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = _take(folder / lock, name)
    except OSError as error:
        _remove_empty(made)
        raise InputError(
            f"{folder} is no folder that can be written to ({error.strerror}); "
            f"choose another {name}"
        ) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            (folder / lock).unlink()  # while it is held: see `_take`
        os.close(held)
        _remove_empty(made)


def _take(path: Path, name: str) -> int:
    """Opens the lock file, locks it and returns its descriptor.

    A process that ends removes the file, so a lock counts only if the file still has this name.
    """
    while True:
        held = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(held), path.stat()):
                os.ftruncate(held, 0)
                os.write(held, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return held
        except BlockingIOError:
            owner = os.read(held, 200).decode(errors="replace") or "another process"
            os.close(held)
            raise InputError(
                f"{path.parent} is in use by {owner}; wait until it has ended, or choose another "
                f"{name}"
            ) from None
        except OSError as error:
            if error.errno in NO_LOCKS:
                log.warning("%s cannot be locked (%s); run one process there", path, error)
                return held
            os.close(held)
            raise
        os.close(held)


def _remove_empty(folders: Iterable[Path]) -> None:
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def require_unclaimed(
    folder: Path, mark: str, names: Iterable[str], reads: str | Path | None = None
) -> None:
    """Refuses to overwrite files that this run did not make.

    Args:
      mark: the file that marks a folder as a run's own; with it all names may be written.
      names: what the run is going to write or replace.
      reads: a file, or its folder, that is an input of the run; that file may be written again.
    Raises: InputError naming the first file that exists without the mark.
    """
    if (folder / mark).exists():
        return
    given = Path(reads).expanduser().absolute() if reads else None
    for name in names:
        require(
            not os.path.lexists(folder / name) or given in (folder, folder / name),
            f"{folder / name} was not made by a run of this folder, which has no {mark}, and would "
            "be overwritten; move it away, or choose another folder",
        )


# ------------------------------------------------------------------------ what a folder is for


def read_mark(path: Path, another: str = "choose another --workdir") -> dict[str, Any] | None:
    """Reads the JSON file that marks a folder; None if there is none.

    Raises: InputError if it cannot be read.
    """
    try:
        return read_json(path) if path.exists() else None
    except InputError as error:
        raise InputError(f"{error}; put it back, or {another}") from error


def require_same(old: Any, new: Any, folder: Path, what: str) -> None:
    """Raises: InputError naming all that differs between what the folder is for and a run."""
    names = differences(old, new)
    require(
        not names,
        f"{folder} holds another {what} ({', '.join(names)} differ); choose another --workdir",
    )


def differences(old: Any, new: Any, name: str = "") -> dict[str, tuple[Any, Any]]:
    """Finds what differs between two JSON values: dotted name -> the old value and the new one.

    A path may be relative on one side and absolute on the other, and weights may be known by the
    shorter fingerprint of an earlier version.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        found = {}
        for key in {**old, **new}:
            found |= differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
        return found
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        found = {}
        for pair in zip(old, new, strict=True):
            found |= differences(*pair, name)
        return found | {name: (old, new)} if name in found else found
    same = old == new or _one_path(old, new) or digests.same_weights(old, new, name)
    return {} if same else {name: (old, new)}


def _one_path(old: Any, new: Any) -> bool:
    """Whether one is the absolute path that the other, relative, stands for."""
    if not (isinstance(old, str) and isinstance(new, str) and old and new):
        return False
    if os.path.isabs(old) == os.path.isabs(new):
        return False
    return os.path.abspath(old) == os.path.abspath(new)
