"""A copy of a workdir in a bucket, from which a run goes on where its machine is lost.

with mirrored("runs/model", "gs://bucket/model"):
    train(config, "runs/model")

The run works in a local folder, as always. A thread copies what is new of it every half minute, and
the rest at the end. The copy is whole at any moment: what the run wrote is sent before the seal of
a later checkpoint, and nothing is removed before what replaces it is there. Digests, which all
these files have, are compared when they are read again.

No lock is possible in a bucket. An object there names the workdir that writes; a workdir that was
new or empty, and fetched the copy, takes over with the first thing that it writes, and the one
before then refuses to write.
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
from collections.abc import Iterator
from pathlib import Path

from dials_jax import sharding
from dials_jax.buckets import Bucket, in_order, is_seal
from dials_jax.errors import InputError, require
from dials_jax.files import parse_json, read_json, write_json
from dials_jax.workdir import exclusive

log = logging.getLogger(__name__)

PERIOD = 30.0  # seconds between two looks at the folder
# Files that say what a workdir is for; they are sent first.
MARKS = ("config.json", "sweep.json", "study.json", "harness.json")
OWN = ".dials_jax"  # how names begin that stay where they are
MIRROR_LOCK, MIRROR_STATE = f"{OWN}.mirror.lock", f"{OWN}.mirror.json"
WRITER, PROBE = f"{OWN}.owner.json", f"{OWN}.probe"  # in the bucket
UNFINISHED = re.compile(rf"\.(tmp|partial|unfinished)$|^{re.escape(OWN)}")


@contextlib.contextmanager
def mirrored(workdir: str | Path, address: str) -> Iterator[Path]:
    """Keeps a copy of a run's workdir in a bucket, and fetches it first if the workdir is new.

    Of several processes every one calls this; the first one copies, so they have to share the
    workdir. At the end, also after an error or a signal, it waits until all is copied.

    Args:
      address: gs://bucket/name or s3://bucket/name, of nothing else.
    Yields: the workdir's absolute path.
    Raises: InputError, before any work, for a bucket that cannot be written, one that another
      workdir writes or that holds other files, and a folder that is no run's; at the end, if
      something could not be copied.
    """
    with exclusive(workdir, lock=MIRROR_LOCK) as folder:
        mirror: list[Mirror] = []  # on the first process
        sharding.on_first_process(lambda: mirror.append(Mirror(folder, address)))
        state = (folder / MIRROR_STATE).read_text() if (folder / MIRROR_STATE).exists() else ""
        shared = f"files in {folder}, which all hosts have to share,"
        sharding.require_same_everywhere({shared: state})
        try:
            yield folder
        except BaseException:
            if mirror:
                try:
                    mirror[0].finish()
                except InputError as error:
                    log.error("%s", error)  # beside what has ended the run
            raise
        sharding.on_first_process(lambda: mirror[0].finish())


class Mirror:
    """Copies a workdir into a bucket, from now on; see `mirrored`.

    Attributes:
      sent: size and time of the files that the bucket has, by name.
    """

    def __init__(self, folder: Path, address: str):
        self.folder, self.bucket = folder, Bucket(address, "--mirror")
        self.sent: dict[str, list[int]] = {}
        self._id = uuid.uuid4().hex  # of this workdir
        self._accepted: list[str] = []  # the ids of owners who may be replaced, this one's first
        self._begin()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._copy_on, name="mirror", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Copies what is left. Raises: InputError if that is impossible."""
        self._over.set()
        self._thread.join()
        try:
            self.push()
        except InputError as error:
            raise InputError(f"{error}; {self.folder} is not copied to its end") from error
        print(f"copied to {self.bucket.address}", flush=True)

    def push(self) -> None:
        """Copies what is new, and removes what was removed from the folder.

        Raises: InputError if the bucket cannot be written, or another workdir writes there.
        """
        owner = self._owner()
        require(
            owner.get("id", "") in self._accepted,
            f"{self.bucket.address} is written by {owner.get('who')} now, so nothing more of "
            f"{self.folder} is copied there; end one of the two",
        )
        seen, lost = self._files(), False
        for name in in_order(self._unsent(seen), first=MARKS):
            if lost and is_seal(name):
                continue  # the folder is being removed
            self._take_over()
            try:
                self.bucket.upload(name, self.folder / name)
                self.sent[name] = seen[name]
            except FileNotFoundError:
                lost = True
        # A run removes a checkpoint once a newer one has its name. This look began after the first
        # had missed the old one: if it finds nothing to send, the newer one is in the bucket.
        now = self._files()
        if not self._unsent(now):
            for name in reversed(in_order(self.sent.keys() - seen.keys() - now.keys())):
                self._take_over()
                self.bucket.remove(name)
                del self.sent[name]
        self._note()

    def _copy_on(self) -> None:
        while not self._over.wait(PERIOD):
            try:
                self.push()
            except Exception as error:  # the run goes on; the last copy decides
                log.warning("%s; it is tried again", error)

    def _begin(self) -> None:
        """Checks both sides, and fetches the copy if the folder is new."""
        sizes, owner = self.bucket.sizes(), self._owner()
        held = {name: size for name, size in sizes.items() if not name.startswith(OWN)}
        before, here = self._state(), self._files()
        where, there = self.folder, self.bucket.address
        another = "name a new --workdir to go on with what is there, or another --mirror"
        if before and before["whole"]:
            require(
                not held or owner.get("id", "") in before["ids"],
                f"{there} was written by {owner.get('who')} after {where}; {another}",
            )
            self._id = before["ids"][0]
            self.sent = {name: now for name, now in before["sent"].items() if name in held}
        elif here and not before:
            require(not held, f"{there} holds files, and not those of {where}; {another}")
            require(
                any(mark in here for mark in MARKS),
                f"{where} holds files that are no run's, and all of it would be copied to {there}; "
                "name another --workdir",
            )
        else:
            require(not held or bool(owner), f"{there} holds files that are no run's; {another}")
            self._fetch(held)
        self._accepted = [self._id, owner.get("id", "")]
        self.bucket.write(PROBE, b"")  # whether it may, before any work
        self.bucket.remove(PROBE)
        self._note()

    def _fetch(self, held: dict[str, int]) -> None:
        """Args: held: bytes of the files there, by name."""
        self._note(whole=False)
        for name, size in held.items():
            self.bucket.download(name, self.folder / name, size)
        self.sent = {name: now for name, now in self._files().items() if name in held}
        if held:
            print(f"{len(held)} files fetched from {self.bucket.address}", flush=True)

    def _take_over(self) -> None:
        if self._accepted != [self._id]:
            who = f"process {os.getpid()} on {socket.gethostname()} in {self.folder}"
            self.bucket.write(WRITER, json.dumps({"id": self._id, "who": who}).encode())
            self._accepted = [self._id]

    def _owner(self) -> dict[str, str]:
        """Who writes in the bucket; {}: nobody has."""
        content = self.bucket.read(WRITER)
        found = parse_json(content, f"{self.bucket.address}/{WRITER}") if content else {}
        require(isinstance(found, dict), f"{self.bucket.address}/{WRITER} is damaged; remove it")
        return found

    def _unsent(self, files: dict[str, list[int]]) -> list[str]:
        return [name for name, now in files.items() if self.sent.get(name) != now]

    def _files(self) -> dict[str, list[int]]:
        """Size and time of all files of the run that have their final names, by name."""
        found = {}
        for inside, folders, names in os.walk(self.folder):
            folders[:] = [name for name in folders if not UNFINISHED.search(name)]
            for name in names:
                path = Path(inside, name)
                with contextlib.suppress(FileNotFoundError):
                    facts = path.lstat()
                    if stat.S_ISREG(facts.st_mode) and not UNFINISHED.search(name):
                        relative = path.relative_to(self.folder).as_posix()
                        found[relative] = [facts.st_size, facts.st_mtime_ns]
        return found

    def _state(self) -> dict | None:
        """What the folder noted about this address; None: nothing."""
        path = self.folder / MIRROR_STATE
        found = read_json(path) if path.exists() else {}
        return found if found.get("address") == self.bucket.address else None

    def _note(self, whole: bool = True) -> None:
        """Args: whole: nothing is to be fetched."""
        state = {"address": self.bucket.address, "whole": whole, "ids": self._accepted}
        write_json(self.folder / MIRROR_STATE, state | {"sent": self.sent}, digest=True)
