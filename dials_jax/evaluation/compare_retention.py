"""Puts the retention of several models side by side, each from its own sweep."""

from __future__ import annotations

from collections.abc import Sequence

from dials_jax.config import as_list
from dials_jax.errors import require, require_packages
from dials_jax.evaluation.compare_sweeps import read_sweep, workdir_names
from dials_jax.files import local_path, require_writable, write_json
from dials_jax.reporting.publish import Report, publish
from dials_jax.reporting.retention import retention_report
from dials_jax.workdir import exclusive, require_unclaimed

RETENTION_MARK = "retention.json"  # marks a folder as one of this report
REPORT_FILES = ("results.json", "results.csv", "results.tex", "report.html", "plots")


def compare_retention(workdirs: str | Sequence[str], out: str | None = None) -> Report:
    """Prints the tables of Goel, Tables 1 to 3; returns the report.

    Args:
      workdirs: of sweeps with static layers, one per model.
      out: folder for tables, figures and a page.
    """
    require_packages("eval", "matplotlib", "scipy")
    folders = [local_path(path, "workdir") for path in as_list(workdirs)]
    require(len(set(folders)) == len(folders), "a workdir is given twice; name each once")
    if out is not None:
        require_writable(local_path(out, "--out"), "--out")
    sweeps = dict(zip(workdir_names(folders), map(read_sweep, folders), strict=True))
    report = retention_report(sweeps)
    print(report.text)
    if out is not None:
        with exclusive(out, "--out") as folder:
            require_unclaimed(folder, RETENTION_MARK, REPORT_FILES)
            write_json(folder / RETENTION_MARK, {"workdirs": [str(path) for path in folders]})
            publish(report, folder)
            print(f"report: {folder / 'report.html'}")
    return report
