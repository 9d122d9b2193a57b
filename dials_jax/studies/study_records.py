"""What studies have measured, in `runs.jsonl`, and what it depends on, in `study.json`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from dials_jax.config import to_dict
from dials_jax.errors import InputError
from dials_jax.records import Check, Lines, Records
from dials_jax.studies.settings import AnyStudy
from dials_jax.workdir import require_same

STUDY = "study.json"
# Settings that choose what is measured or how it is shown: a study continues when they change.
DISPLAY_FIELDS = (
    "schedules", "figure", "aggregate", "num_extremes", "budget", "importance", "adapted",
    "num_decoded",
)  # fmt: skip


def study_records(
    cfg: AnyStudy, weights: Mapping[str, Any], workdir: str | Path, check: Check
) -> Records:
    """Opens the records of a study, those of an earlier run of it first.

    Args:
      weights: fingerprints of the models, and of data, that the measurements depend on.
      check: raises for an object that is not a record.
    Raises: InputError if the workdir holds another study.
    """
    settings = {name: value for name, value in to_dict(cfg).items() if name not in DISPLAY_FIELDS}
    identity = {"kind": type(cfg).__name__, "config": settings, "weights": weights}
    return Records(workdir, identity, check, STUDY, continued_study)


def continued_study(
    old: Mapping[str, Any], new: Mapping[str, Any], workdir: Path
) -> Mapping[str, Any]:
    """Returns the identity that a study goes on with. Raises: InputError naming what differs."""
    require_same(_completed(old), new, workdir, "study")
    return old


def _completed(old: Mapping[str, Any]) -> Mapping[str, Any]:
    """Gives its settings today's names, and defaults to those that are newer than it."""
    kinds = {cls.__name__: cls for cls in get_args(AnyStudy)}
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


def read_records(path: str | Path, check: Check) -> list[dict[str, Any]]:
    """Reads the records of another run, up to the last whole line: a stop may leave half a line.

    Raises: InputError naming the first line that is not a record.
    """
    lines = Lines.read(Path(path), check)
    for number, why in lines.odd.items():
        raise InputError(
            f"{path}, line {number} {why}; run that study again, which measures it anew"
        )
    return list(lines.good.values())
