"""Copies a folder or a file from a bucket to this machine, or from it to a bucket.

dials copy gs://bucket/run/model runs/model
dials copy runs/model s3://bucket/model
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from dials_jax.buckets import Bucket, in_order, is_address
from dials_jax.errors import require
from dials_jax.files import local_path


def copy_command() -> None:
    """Copies, and says how much."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="SRC", help="a folder or a file")
    parser.add_argument("target", metavar="DST", help="what it becomes; there is nothing yet")
    given = parser.parse_args()
    source, target = given.source, given.target
    require(
        is_address(source) != is_address(target),
        "one of SRC and DST has to be an address, as gs://bucket/model or s3://bucket/model; "
        "give one, or use cp",
    )
    done = fetch(source, target) if is_address(source) else send(source, target)
    print(f"{source} -> {target}: {done}")


def fetch(address: str, target: str) -> str:
    """From a bucket; DST gets its name when it is whole. Returns: how much it was, in words.

    Raises: InputError for an address that holds nothing, and a target that exists.
    """
    from dials_jax.stored import new_folder, require_new, unfinished_name

    place = local_path(target, "DST")
    require_new(place)
    bucket = Bucket(address, "SRC")
    sizes = bucket.sizes()
    require(bool(sizes), f"SRC={bucket.address} holds nothing; name a folder or a file there")
    if list(sizes) == [""]:
        partial = unfinished_name(place)
        bucket.download("", partial, sizes[""])
        partial.rename(place)
    else:
        require("" not in sizes, f"SRC={bucket.address} is a file and a folder; name one in it")
        with new_folder(place, "run the same command again") as unfinished:
            for name, size in sizes.items():
                bucket.download(name, unfinished / name, size)
    return amount(sizes.values())


def send(source: str, address: str) -> str:
    """To a bucket. Returns: how much it was, in words.

    Raises: InputError for a source without files, and an address that holds some.
    """
    place = local_path(source, "SRC")
    paths = [place] if place.is_file() else [x for x in place.rglob("*") if x.is_file()]
    files = {"" if x == place else x.relative_to(place).as_posix(): x for x in paths}
    require(bool(files), f"SRC={source} is no file, and no folder that holds some; name one")
    bucket = Bucket(address, "DST")
    require(
        not bucket.sizes(), f"DST={bucket.address} holds files; remove them, or name another place"
    )
    for name in in_order(files):
        bucket.upload(name, files[name])
    return amount(path.stat().st_size for path in paths)


def amount(sizes: Iterable[int]) -> str:
    sizes = list(sizes)
    return f"{len(sizes)} file{'s' * (len(sizes) > 1)}, {sum(sizes) / 1e6:,.1f} MB"
