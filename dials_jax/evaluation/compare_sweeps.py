"""Compares any two rows of sweeps by a paired test."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from dials_jax.config import as_list
from dials_jax.errors import nearest, require, require_packages
from dials_jax.evaluation.sweep_records import check_record
from dials_jax.files import local_path, read_json, require_writable, write_json
from dials_jax.records import require_sound
from dials_jax.reporting.comparison import (
    Comparison,
    compare_all,
    merge_results,
    pairs_legend,
    pairs_table,
    require_pairs,
    rows_by_items,
)
from dials_jax.reporting.publish import as_dicts, write_csv
from dials_jax.reporting.speed import SweepRun
from dials_jax.reporting.sweep_table import WIDTH
from dials_jax.workdir import exclusive, require_unclaimed

COMPARED, CSV = "comparison.json", "comparison.csv"  # the first marks the folder as ours


def compare_sweeps(
    workdirs: str | Sequence[str],
    only: str | Sequence[str] = (),
    holm: bool = False,
    out: str | None = None,
) -> list[Comparison]:
    """Prints a matrix of all pairs of rows per task; returns what it found.

    Args:
      workdirs: of sweeps.
      only: labels of the rows to compare; none: all.
      holm: correct p for the number of pairs.
      out: folder for a CSV with intervals.
    """
    require_packages("eval", "scipy")
    folders = [local_path(path, "workdir") for path in as_list(workdirs)]
    require(len(set(folders)) == len(folders), "a workdir is given twice; name each once")
    if out is not None:
        require_writable(local_path(out, "--out"), "--out")
    results = dict(zip(workdir_names(folders), map(read_sweep, folders), strict=True))
    runs, rules = merge_results(results)
    groups = rows_by_items(_only(runs, as_list(only)), rules)
    require_pairs(groups)
    found = []
    print(textwrap.fill(pairs_legend(holm), WIDTH))
    for task, rows in groups.items():
        pairs = compare_all(task, rows)
        print(f"\n{task} ({rows[0]['metric']}, {len(rows[0]['items'])} items)")
        print(pairs_table(rows, pairs, holm).text())
        found += pairs
    if out is not None:
        write_comparisons(found, out, folders)
    return found


def workdir_names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that differ."""
    for count in range(1, max(len(path.parts) for path in folders) + 1):
        names = [os.path.join(*path.parts[-count:]) for path in folders]
        if len(set(names)) == len(names):
            break
    return names


def read_sweep(workdir: Path) -> dict[str, Any]:
    """Reads the results.json of a sweep of any version.

    Raises: InputError if there is none, or if it is damaged.
    """
    path = workdir / "results.json"
    require(
        path.exists(), f"{workdir} has no results.json; give the --workdir of a sweep of eval.py"
    )
    found = read_json(path)
    require("runs" in found, f"{path} is not of a sweep; give the --workdir of one")
    with require_sound(path, "run its sweep again, which writes it anew"):
        dict(found["environment"])
        for run in found["runs"]:
            check_record({"run": run}, found["model"]["num_layers"])
    require(bool(found["runs"]), f"{path} has no finished run; continue its sweep first")
    return found


def _only(runs: Sequence[SweepRun], labels: Sequence[str]) -> list[SweepRun]:
    known = [run["policy"]["label"] for run in runs]
    for label in labels:
        require(label in known, f"--only: there is no row {label!r}{nearest(label, known)}")
    return [run for run in runs if not labels or run["policy"]["label"] in labels]


def write_comparisons(
    found: Sequence[Comparison], out: str | Path, folders: Sequence[Path]
) -> None:
    """Writes the CSV, and a JSON file with the same rows that says whose they are."""
    columns = [field.name for field in fields(Comparison)]
    rows: list[Mapping[str, Any]] = as_dicts(found)
    with exclusive(out, "--out") as folder:
        require_unclaimed(folder, COMPARED, (CSV,))
        write_json(folder / COMPARED, {"workdirs": [str(path) for path in folders], "pairs": rows})
        write_csv(folder / CSV, columns, rows)
        print(f"\nwritten: {folder / CSV}")
