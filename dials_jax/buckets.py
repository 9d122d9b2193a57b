"""Files in buckets, gs:// and s3://, by fsspec, whose packages find out who may read and write.

An object of a bucket is whole or not there, but nothing can be renamed, locked or appended to. So
what says that a folder is whole is written last, and removed first: see `in_order`.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from dials_jax.errors import InputError, require, require_packages

PACKAGES = {"gs": ("gcs", "gcsfs"), "s3": ("s3", "s3fs")}  # scheme -> extra, package
# No user or query, which could hold a secret.
ADDRESS = re.compile(r"(gs|s3)://([^/@?#\s]+/[^@?#]*[^@?#/])/*")
# Digests of all beside them, of a model and of a checkpoint, which counts models as written before.
SEALS = ("config.json", "digest.json")
AT_ONCE = 2**28  # bytes; a smaller file is read before it is sent, since it may grow meanwhile
PART = 2**25  # bytes that are sent at a time
PATIENCE = 60.0  # seconds in which a bucket has to say something
LOCAL = (errno.ENOSPC, errno.EDQUOT)  # of this machine's disk, and no fault of a bucket


class Unreachable(InputError):
    """A bucket did not do what was asked; the message says why, in one line."""


def is_address(text: str) -> bool:
    """Whether it is meant to be a place in a bucket."""
    return text.startswith(tuple(f"{scheme}://" for scheme in PACKAGES))


def check_address(address: str, name: str) -> str:
    """Returns an address without slashes at its end.

    Args:
      name: of the option or field that gave it, for messages.
    Raises: InputError for anything but an address, and for a package that is missing.
    """
    match = ADDRESS.fullmatch(address)
    if match is None or leads_out(match[2]):  # what is behind the scheme may hold a secret
        shown = re.split("[@?#]", address)[0][:80] if "@" not in address else "..."
        raise InputError(f"{name}={shown} is no address; give one as gs://bucket/run or s3://...")
    extra, package = PACKAGES[match[1]]
    require_packages(extra, package)
    return f"{match[1]}://{match[2]}"


def in_order(names: Iterable[str], first: Iterable[str] = ()) -> list[str]:
    """The order to write files in, so that a folder that looks whole is: its seal comes last.

    Args:
      first: names to begin with.
    """

    def key(name: str):
        last = PurePosixPath(name).name
        return name not in first, SEALS.index(last) + 1 if last in SEALS else 0, name

    return sorted(names, key=key)


def leads_out(name: str) -> bool:
    """Whether a name could mean something outside its folder, or no file at all."""
    return bool({"", ".", ".."} & set(name.split("/"))) or "\0" in name


class Bucket:
    """What lies below an address, by relative names such as `checkpoints/00000004/digest.json`.

    Every method raises Unreachable, in one line, when the bucket does not do what is asked.

    Args:
      name: of the option or field that gave the address, for messages.
    Raises: InputError, see `check_address`.
    """

    def __init__(self, address: str, name: str):
        self.address = check_address(address, name)
        import fsspec

        scheme, self._root = self.address.split("://")
        with self._reached():
            # Other processes write, too, so nothing is remembered of what is there.
            options = {"use_listings_cache": False, "skip_instance_cache": True}
            self._files = fsspec.filesystem(scheme, **options | self._settings(scheme))

    def sizes(self) -> dict[str, int]:
        """Returns the bytes of all objects by name; the name of one at the address itself is "".

        Raises: InputError for a name that leads out of a folder.
        """
        with self._reached():
            found = self._files.find(self._root, detail=True)
        sizes = {
            path.removeprefix(self._root).removeprefix("/"): info["size"]
            for path, info in found.items()
            if info["type"] == "file" and not path.endswith("/")  # some tools mark folders so
        }
        for name in filter(None, sizes):
            wrong = leads_out(name)
            require(not wrong, f"{self.address} holds the name {name!r}, which is no file's")
        return sizes

    def read(self, name: str) -> bytes | None:
        """Returns an object's content; None: there is no such object."""
        with self._reached():
            try:
                return self._files.cat_file(self._path(name))
            except FileNotFoundError:
                return None

    def write(self, name: str, content: bytes) -> None:
        """Makes an object, or replaces it at once."""
        parts = {}
        if self.address.startswith("gs") and content:
            # In parts, if only one. A body that gcsfs sends whole ends at "\n--==0==", which the
            # content may hold, and a reader that follows MIME's standard drops a last "\r".
            parts["chunksize"] = min(len(content), PART)
        with self._reached():
            self._files.pipe_file(self._path(name), content, **parts)

    def upload(self, name: str, file: Path) -> None:
        """Writes a file's content. Raises: FileNotFoundError if the file is missing."""
        if file.stat().st_size < AT_ONCE:
            return self.write(name, file.read_bytes())
        with self._reached():
            self._files.put_file(str(file), self._path(name))

    def download(self, name: str, file: Path, size: int) -> None:
        """Writes an object of `size` bytes to a file, in a folder that is made if it is missing."""
        file.parent.mkdir(parents=True, exist_ok=True)
        found = True
        with self._reached():
            try:
                self._files.get_file(self._path(name), str(file))
            except FileNotFoundError:
                found = False
        if not found or file.stat().st_size != size:
            raise Unreachable(
                f"{self.address}/{name} changed while it was read; run the same command again"
            )

    def remove(self, name: str) -> None:
        with self._reached(), contextlib.suppress(FileNotFoundError):
            self._files.rm_file(self._path(name))

    @staticmethod
    def _settings(scheme: str) -> dict[str, Any]:
        """By default gcsfs waits without end, compares nothing, and prints tracebacks of errors."""
        if scheme != "gs":
            return {}
        import aiohttp

        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
        patience = aiohttp.ClientTimeout(total=None, sock_connect=PATIENCE, sock_read=PATIENCE)
        return {"requests_timeout": patience, "consistency": "md5"}

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    @contextlib.contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the packages raise errors of many kinds
            if getattr(error, "errno", None) in LOCAL:
                raise
            first = (str(error).strip().splitlines() or [""])[0]
            # An address may have a password, or a query that is signed.
            reason = re.sub(r"\?\S*|(?<=//)[^/@\s]*@", "", first)[:200]
            raise Unreachable(
                f"{self.address} cannot be used ({type(error).__name__}: {reason}); check the "
                "bucket, the network and the right to read and write there"
            ) from error
