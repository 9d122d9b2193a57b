"""A copy of a workdir in a bucket, from which a run goes on where its machine is lost.

with mirrored("runs/model", "gs://bucket/model"):
    train(config, "runs/model")

The run works in a local folder, as always. A thread copies what is new of it every half minute, and
the rest at the end. The copy can be used at any moment: a checkpoint or a model counts once its
seal is there, which is sent after all that the run wrote before it, and a checkpoint is removed
only when a newer one is there. Digests are compared when files are read again.

No lock is possible in a bucket. An object there names the workdir that writes. One that has fetched
the copy takes over with the first thing that it writes, if nothing has changed since, and the one
before notices it before it writes again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import socket
import stat
import threading
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dials_jax import sharding, stored
from dials_jax.buckets import Bucket, in_order
from dials_jax.errors import InputError, require
from dials_jax.files import parse_json, read_json, write_json
from dials_jax.stopping import Request, Stopped
from dials_jax.workdir import exclusive

log = logging.getLogger(__name__)

PERIOD = 30.0  # seconds between two looks at the folder
# Files that say what a workdir is for: sent first and fetched last.
MARKS = ("config.json", "sweep.json", "study.json", "harness.json")
# Folders of a run that count as a whole, when the file with their digests is there.
SEALED = re.compile(r"(checkpoints/\d+|(?:steps/\d+/)?(?:model|router))/")
OWN = ".dials_jax"  # how names begin that stay where they are
MIRROR_LOCK, MIRROR_STATE = f"{OWN}.mirror.lock", f"{OWN}.mirror.json"
WRITER, PROBE = f"{OWN}.owner.json", f"{OWN}.probe"  # in the bucket
# Names that are not final yet, of this library and of Orbax, and marks of this machine.
PASSING = re.compile(
    rf"\.(tmp|partial|unfinished)$|\.orbax-checkpoint-tmp|^{re.escape(OWN)}|^{stored.MARK}$"
)
Facts = list[int]  # size and time of a file
NOWHERE = 0  # the time of a file that is in the bucket only


@contextlib.contextmanager
def mirrored(workdir: str | Path, address: str) -> Iterator[Path]:
    """Keeps a copy of a run's workdir in a bucket, and fetches it first if the workdir is new.

    Of several processes every one calls this; the first one copies, so they have to share the
    workdir. At the end, also after an error or a signal, it waits until all is copied. A signal in
    this time, to any process, is obeyed after it by all, a second Ctrl-C at once.

    Args:
      address: gs://bucket/name or s3://bucket/name, of nothing else.
    Yields: the workdir's absolute path.
    Raises: InputError, before any work, for a bucket that cannot be written, one that another
      workdir writes or that holds other files, and a folder that is no run's; at the end, if
      something could not be copied.
    """
    with exclusive(workdir, lock=MIRROR_LOCK) as folder:
        mirrors: list[Mirror] = []  # one, on the first process
        sharding.on_first_process(lambda: mirrors.append(Mirror(folder, address)))
        state = (folder / MIRROR_STATE).read_text() if (folder / MIRROR_STATE).exists() else ""
        shared = f"files in {folder}, which all hosts have to share,"
        sharding.require_same_everywhere({shared: state})
        for mirror in mirrors:
            mirror.start()
        try:
            yield folder
        except BaseException:  # this process alone may have failed: the others are not waited for
            for mirror in mirrors:
                try:
                    with _copied_first():  # the run ends by what has ended it
                        mirror.finish()
                except Exception as error:
                    log.error("%s", error)  # beside what has ended the run
            raise
        with _copied_first() as request:
            sharding.on_first_process(lambda: mirrors[0].finish())
            if request.came(meeting=True):
                raise Stopped(f"{folder} is copied to {address}", request.signum)


@contextlib.contextmanager
def _copied_first() -> Iterator[Request]:
    """What is in it goes on to its end, also if a signal comes meanwhile."""
    with Request("when all is copied") as request:
        request.start()
        yield request


class Mirror:
    """Copies a workdir into a bucket; see `mirrored`. It begins with the copy, if that is there.

    Attributes:
      id: of this workdir, which the bucket's owner has.
      sent: the files that the bucket has, by name, as they were here.
    Raises: InputError, see `mirrored`.
    """

    def __init__(self, folder: Path, address: str):
        self.folder, self.bucket = folder, Bucket(address, "--mirror")
        self.id, self.sent = uuid.uuid4().hex, dict[str, Facts]()
        self._wrote = False  # as the owner, in this process
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._copy_on, name="mirror", daemon=True)
        self._begin()

    def start(self) -> None:
        """Copies from now on, beside the run."""
        self._thread.start()

    def finish(self) -> None:
        """Copies what is left. Raises: InputError if that is impossible."""
        left = f"{self.folder} is not copied to its end"
        self._over.set()
        self._thread.join()
        try:
            late = self.push()
        except (InputError, OSError) as error:
            raise InputError(f"{error}; {left}") from error
        require(not late, f"{late} changed while they were copied; {left}")
        print(f"copied to {self.bucket.address}", flush=True)

    def push(self) -> list[str]:
        """Copies what is new, and removes what was removed from the folder.

        Returns: seals of folders that were changed or removed before all of them was copied.
        Raises: InputError if the bucket cannot be written, or another workdir writes there; OSError
          if the folder cannot be read.
        """
        # What the run wrote before a seal of the first look is seen by the second one.
        first, seen = self._files(), self._files()
        lost = [mark for mark in MARKS if mark in self.sent and mark not in seen]
        require(not lost, f"{self.folder} has lost its {lost}; the copy is left as it is")
        self._remove(self.sent.keys() & self._late(seen))
        seals = {name for name in seen if name == seal_of(name)}
        for name in in_order(set(self._unsent(seen)) - seals, first=MARKS):
            self._send(name, seen[name])
        torn = self._late({name: seen[name] for name in seen.keys() - seals})
        for name in in_order(seals.intersection(self._unsent(seen)) - torn):
            if first.get(name) == seen[name]:
                self._send(name, seen[name])
        # A run removes checkpoints once there is a newer one, which this look may have missed.
        newest = max((x for x in self.sent if x == seal_of(x) and "digest" in x), default="")
        self._remove(x for x in self.sent.keys() - seen.keys() if seal_of(x) != newest)
        self._note()
        return sorted(self._late(seen))

    def _send(self, name: str, facts: Facts) -> None:
        self._take_over()
        with contextlib.suppress(FileNotFoundError):  # it was removed meanwhile
            self.bucket.upload(name, self.folder / name)
            self.sent[name] = facts

    def _remove(self, names: Iterable[str]) -> None:
        for name in reversed(in_order(names)):
            self._take_over()
            self.bucket.remove(name)
            del self.sent[name]

    def _copy_on(self) -> None:
        while not self._over.wait(PERIOD):
            try:
                if late := self.push():
                    log.warning(
                        "%s changed before all was copied; if that is said often, raise "
                        "save_every or keep_checkpoints",
                        late,
                    )
            except Exception as error:  # the run goes on; the last copy decides
                log.warning("%s; it is tried again", error)

    # ------------------------------------------------------------------------------- whose it is

    def _begin(self) -> None:
        """Checks both sides, and fetches the copy if the folder is new."""
        held, before, here = self._held(), self._state(), self._files()
        if before.get("whole"):
            self.id, self.sent = before["id"], before["sent"]
        elif before or not here:
            self._fetch(held)
        else:
            require(
                any(mark in here for mark in MARKS),
                f"{self.folder} holds files that are no run's, and all of it would be copied to "
                f"{self.bucket.address}; name another --workdir",
            )
        self._is_owner()
        self.sent = {name: facts for name, facts in self.sent.items() if name in held}
        self.bucket.write(PROBE, b"")  # whether it may, before any work
        self.bucket.remove(PROBE)
        self._note()

    def _fetch(self, held: dict[str, int]) -> None:
        """Args: held: bytes of the files there, by name."""
        there = self.bucket.address
        require(
            not held or bool(self._owner()),
            f"{there} holds files that are no run's; name another --mirror",
        )
        self._note(whole=False)
        # Half a checkpoint or model stays where it is, to be removed there.
        whole = [name for name in held if (seal_of(name) or name) in held]
        for name in sorted(in_order(whole), key=MARKS.__contains__):
            self.bucket.download(name, self.folder / name, held[name])
        here = self._files()
        self.sent = {name: here.get(name, [size, NOWHERE]) for name, size in held.items()}
        if held:
            print(f"{len(whole)} files fetched from {there}", flush=True)

    def _take_over(self) -> None:
        """Before each write: another workdir may write there by now."""
        if not self._is_owner():
            who = f"{self.folder} on {socket.gethostname()}"
            self.bucket.write(WRITER, json.dumps({"id": self.id, "who": who}).encode())
            self._wrote = True

    def _is_owner(self) -> bool:
        """Whether the bucket names this workdir.

        Raises: InputError if it names another, or none, and holds something else than this one has
          fetched.
        """
        owner = self._owner()
        if owner.get("id") == self.id:
            return True
        held, known = self._held(), {name: size for name, (size, _) in self.sent.items()}
        require(
            not self._wrote and (not held or held == known),
            f"{self.bucket.address} holds what {owner.get('who', 'something else')} wrote, so "
            f"nothing of {self.folder} is copied there; name a new --workdir to go on with what is "
            "there, or another --mirror",
        )
        return False

    def _owner(self) -> dict[str, str]:
        """Who writes in the bucket; {}: nobody has."""
        content = self.bucket.read(WRITER)
        found = parse_json(content, f"{self.bucket.address}/{WRITER}") if content else {}
        require(isinstance(found, dict), f"{self.bucket.address}/{WRITER} is damaged; remove it")
        return found

    # ------------------------------------------------------------------------------- what is where

    def _held(self) -> dict[str, int]:
        """Bytes of the run's files in the bucket, by name."""
        sizes = self.bucket.sizes()
        return {name: size for name, size in sizes.items() if not name.startswith(OWN)}

    def _files(self) -> dict[str, Facts]:
        """All files of the run that have their final names.

        Raises: OSError if a folder cannot be read: what is in it is not gone. InputError for links.
        """

        def stop(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError) or not self.folder.exists():
                raise error

        found = {}
        for inside, folders, names in os.walk(self.folder, onerror=stop):
            folders[:] = [name for name in folders if not PASSING.search(name)]
            for name in (*folders, *(name for name in names if not PASSING.search(name))):
                path = Path(inside, name)
                with contextlib.suppress(FileNotFoundError):
                    facts = path.lstat()
                    linked = stat.S_ISLNK(facts.st_mode)
                    require(not linked, f"{path} is a link, and --mirror copies none; replace it")
                    if stat.S_ISREG(facts.st_mode):
                        relative = path.relative_to(self.folder).as_posix()
                        found[relative] = [facts.st_size, facts.st_mtime_ns]
        return found

    def _unsent(self, files: dict[str, Facts]) -> list[str]:
        return [name for name, facts in files.items() if self.sent.get(name) != facts]

    def _late(self, files: dict[str, Facts]) -> set[str]:
        """Seals of folders of which something is not sent."""
        return {seal for seal in map(seal_of, self._unsent(files)) if seal}

    def _state(self) -> dict[str, Any]:
        """What the folder noted about this address; {}: nothing."""
        path = self.folder / MIRROR_STATE
        found = read_json(path) if path.exists() else {}
        return found if found.get("address") == self.bucket.address else {}

    def _note(self, whole: bool = True) -> None:
        """Args: whole: nothing is to be fetched."""
        state = {"address": self.bucket.address, "id": self.id, "whole": whole, "sent": self.sent}
        write_json(self.folder / MIRROR_STATE, state, digest=True)


def seal_of(name: str) -> str | None:
    """The file that says that the folder which a name lies in is whole; None: each file counts."""
    match = SEALED.match(name)
    kind = "digest.json" if name.startswith("checkpoints/") else "config.json"
    return f"{match[0]}{kind}" if match else None
