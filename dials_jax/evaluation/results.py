"""Records of a run, stored as soon as they are measured, and what they depend on."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import jax

from dials_jax import digests, sharding
from dials_jax.config import StudyConfig, to_dict
from dials_jax.errors import InputError, require
from dials_jax.files import read_json, write_json
from dials_jax.records import Check, Lines, sealed

RECORDS = "runs.jsonl"
IDENTITY = "study.json"  # what the records of a study depend on
# Settings that choose what is measured or how it is shown: a study continues when they change.
DISPLAY_FIELDS = ("schedules", "figure", "aggregate", "num_extremes", "budget", "importance")
Agree = Callable[[Mapping[str, Any], Mapping[str, Any], Path], Mapping[str, Any]]


def identity(cfg: StudyConfig, weights: dict[str, Any]) -> dict[str, Any]:
    """What measurements depend on; `weights` are fingerprints."""
    settings = {name: value for name, value in to_dict(cfg).items() if name not in DISPLAY_FIELDS}
    return {"kind": type(cfg).__name__, "config": settings, "weights": weights}


def same_study(old: Mapping[str, Any], new: Mapping[str, Any], workdir: Path) -> Mapping[str, Any]:
    """The identity that a study continues with.

    Raises: InputError naming what differs.
    """
    others = differing(_completed(old), new)
    require(
        not others,
        f"{workdir} holds another study ({', '.join(others)} differ); choose another --workdir",
    )
    return old


class Records:
    """Results of a run that may be stopped: one JSON object per line, written when measured.

    Every line ends with a short digest of the rest. A line that does not match its digest is set
    aside, so that its results are measured again.

    Attributes:
      all: the records so far, those of an earlier run first.
    """

    def __init__(
        self,
        workdir: str | Path,
        identity: Mapping[str, Any],
        check: Check,
        name: str = IDENTITY,
        agree: Agree = same_study,
        before: tuple[Mapping[str, Any], Sequence[dict[str, Any]]] | None = None,
    ):
        """Continues what the workdir holds, or starts.

        Args:
          identity: what the results depend on; stored in the file called `name`.
          check: raises for an object that is not a record.
          agree: gives the identity to continue with, from that of the workdir and the new one.
          before: identity and records of an earlier version, which stored them elsewhere.
        Raises: InputError if the workdir holds results that depend on something else.
        """
        workdir = Path(workdir)
        self.path = workdir / RECORDS
        identity = json.loads(json.dumps(identity))
        known = workdir / name
        old = _read_identity(known) if known.exists() else None
        lines = found = Lines.read(self.path, check)
        if old is None and before is not None:
            old, lines = before[0], Lines.of(self.path, before[1])
        require(  # a process killed while taking over earlier records has written the same lines
            known.exists() or not found.good or (lines is not found and found.lines == lines.lines),
            f"{workdir} holds {RECORDS} but no {name} that says of what; put it back, or choose "
            "another --workdir",
        )
        if old is not None:
            identity = dict(agree(old, identity, workdir))
        self.all = list(lines.good.values())

        def open_for_more():  # once all processes have read what is there
            lines.set_aside()
            if identity != old or not known.exists():
                write_json(known, identity)

        sharding.wait()
        sharding.on_first_process(open_for_more)

    def add(self, record: Mapping[str, Any]) -> None:
        """Every process calls this; the first one writes. NaN and infinity become null."""
        if jax.process_index() == 0:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(sealed(record) + "\n")
        self.all.append(dict(record))


def _read_identity(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except InputError as error:
        raise InputError(f"{error}; put it back, or choose another --workdir") from error


def _completed(old: dict[str, Any]) -> dict[str, Any]:
    """With today's names of its settings, and the defaults of those that are newer than it."""
    kinds = {cls.__name__: cls for cls in get_args(StudyConfig)}
    config = old.get("config")
    if old.get("kind") not in kinds or not isinstance(config, dict):
        return old
    kind = kinds[old["kind"]]
    defaults = {
        f.name: to_dict(f.default) if dataclasses.is_dataclass(f.default) else f.default
        for f in dataclasses.fields(kind)
        if f.default is not dataclasses.MISSING and f.name not in DISPLAY_FIELDS
    }
    return {**old, "config": {**json.loads(json.dumps(defaults)), **kind.upgraded(config)}}


def differing(old: Any, new: Any, name: str = "") -> list[str]:
    """Dotted names of what differs. A path may be relative on one side, absolute on the other."""
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = {key: (old.get(key), new.get(key)) for key in {**old, **new}}
        return [
            found
            for key, pair in pairs.items()
            for found in differing(*pair, f"{name}.{key}" if name else key)
        ]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        found = [x for pair in zip(old, new, strict=True) for x in differing(*pair, name)]
        return list(dict.fromkeys(found))
    same = old == new or _one_path(old, new) or digests.same_weights(old, new, name)
    return [] if same else [name]


def _one_path(old: Any, new: Any) -> bool:
    """Whether one is the absolute path that the other, relative, stands for."""
    if not (isinstance(old, str) and isinstance(new, str) and old and new):
        return False
    if os.path.isabs(old) == os.path.isabs(new):
        return False
    return os.path.abspath(old) == os.path.abspath(new)
