"""What runs have found, as objects: the results of sweeps and studies, and training metrics.

results = load_results("runs/sweep")
results                                    # a line, and one per policy
print(results.table)                       # with paired tests
results.row("routed λ=2").value
results.select(seed=0).to_dataframe()      # needs pandas
results.plot("tradeoff")                   # a matplotlib figure
"""

from __future__ import annotations

import csv
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dials_jax.config import shown
from dials_jax.data.records import file_sha256
from dials_jax.errors import nearest, require, require_packages
from dials_jax.files import local_path, read_json
from dials_jax.records import require_sound
from dials_jax.reporting.publish import CSV_DIGEST, Figure
from dials_jax.reporting.sweep_report import sweep_report
from dials_jax.reporting.sweep_rows import SweepRow, compute_sweep_rows, csv_rows
from dials_jax.reporting.sweep_table import format_table
from dials_jax.reporting.training_plots import is_finite, read_metrics, training_curves

if TYPE_CHECKING:  # matplotlib and pandas are optional
    import matplotlib.figure
    import pandas

METRICS, RESULTS = "metrics.jsonl", "results.json"
SHOWN_RUNS = 12  # in a notebook


def load_results(path: str | Path) -> SweepResults | StudyResults | TrainingResults:
    """Reads what a sweep, a study or a training has found so far.

    Args:
      path: its workdir, or the results.json or metrics.jsonl there.

    Raises: InputError for a path without results, and for files that are damaged.
    """
    file = local_path(path, "path")
    if file.is_dir():
        found = [file / name for name in (RESULTS, METRICS) if (file / name).is_file()]
        require(
            bool(found),
            f"{file} holds neither {RESULTS} nor {METRICS}; give the workdir of a sweep, a study "
            "or a training",
        )
        file = found[0]
    if file.suffix == ".jsonl":
        return TrainingResults(read_metrics(file), file.parent)
    values = read_json(file)
    if "kind" in values:
        return StudyResults(values, file.parent)
    require("runs" in values, f"{file} is not of a sweep or a study; give one that is")
    results = SweepResults(values, file.parent)
    with results._sound():
        repr(results)  # reads what all of the rest needs
    return results


class _Results(dict, ABC):
    """The JSON values of a run's results, with its rows, as a data frame and as figures.

    Attributes:
      folder: the workdir.
    """

    def __init__(self, values: Mapping[str, Any], folder: str | Path):
        super().__init__(values)
        self.folder = Path(folder)

    @abstractmethod
    def _rows(self) -> Sequence[Mapping[str, Any]]:
        """Those of the data frame."""

    @abstractmethod
    def _plots(self) -> Mapping[str, Callable[[], Any]]:
        """What draws each figure, by its name."""

    def to_dataframe(self) -> pandas.DataFrame:
        """The rows as a data frame. Raises: InputError without pandas."""
        require_packages("eval", "pandas")
        from pandas import DataFrame

        return DataFrame(self._rows())

    @property
    def plots(self) -> list[str]:
        """Names of the figures that `plot` draws."""
        require_packages("eval", "matplotlib", "scipy")
        return list(self._plots())

    def plot(self, name: str | None = None) -> matplotlib.figure.Figure:
        """Draws a figure. Args: name: one of `plots`; None: the first of them."""
        names = self.plots
        require(bool(names), f"{self!r} has nothing to draw")
        name = names[0] if name is None else name
        require(name in names, f"there is no figure {name!r}{nearest(name, names)}")
        return self._plots()[name]()


class SweepResults(_Results):
    """The results of a sweep: those of results.json."""

    def __repr__(self) -> str:
        """A line about the whole, and one for each of the first runs."""
        runs = self["runs"]
        counts = f"{len(_of('task', runs))} tasks, {len(_of('policy', runs))} policies"
        lines = [f"SweepResults({str(self.folder)!r}, {counts})"]
        names = [f"{run['task']}: {run['policy']['label']}" for run in runs[:SHOWN_RUNS]]
        for name, run in zip(names, runs, strict=False):
            value, share = np.mean(list(run["items"].values())), run["flops"]["layers_run"]
            lines.append(f"{name:{max(map(len, names))}}  {value:.4f}  {share:6.1%} of layers")
        more = len(runs) - SHOWN_RUNS
        return "\n".join([*lines, *([f"... and {more} more"] if more > 0 else [])])

    @property
    def table(self) -> str:
        """All rows as text, with paired tests against the full model."""
        with self._sound():
            return format_table(self.rows)

    @cached_property
    def rows(self) -> list[SweepRow]:
        """One per policy and task, over all seeds. Raises: InputError for damaged results."""
        require_packages("eval", "scipy")
        with self._sound():
            return compute_sweep_rows(self)

    def _sound(self) -> AbstractContextManager[None]:
        return require_sound(self.folder / RESULTS, "run the sweep again, which writes it anew")

    def row(self, policy: str, task: str | None = None) -> SweepRow:
        """The row of one policy. Args: task: may be left out where there is only one."""
        tasks = _of("task", self["runs"])
        require(task is not None or len(tasks) == 1, f"name the task: task= one of {tasks}")
        chosen = self.select(task=task, policy=policy)
        return next(row for row in chosen.rows if row.policy == policy)

    def select(
        self, *, task: str | None = None, policy: str | None = None, seed: int | None = None
    ) -> SweepResults:
        """The results of one task, policy or seed, and those of the full model beside them.

        Rows of a policy stay compared with the full model's.

        Raises: InputError for a name that is not there, naming the nearest one.
        """
        wanted = {"task": task, "policy": policy, "seed": seed}
        runs = self["runs"]
        for name, value in wanted.items():
            if value is not None:
                known = _of(name, runs)
                hint = nearest(str(value), map(str, known))
                require(value in known, f"there is no {name} {shown(value)}{hint}")
                runs = [
                    run
                    for run in runs
                    if _value(name, run) == value
                    or (name == "policy" and run["policy"]["kind"] == "full")
                ]
        return SweepResults({**self, "runs": runs}, self.folder)

    def _rows(self) -> Sequence[Mapping[str, Any]]:
        return csv_rows(self.rows)

    def _plots(self) -> Mapping[str, Callable[[], Any]]:
        return {figure.name: _drawing(figure) for figure in sweep_report(self, self.rows).figures}


class StudyResults(_Results):
    """The results of a study: those of results.json."""

    def __repr__(self) -> str:
        return f"StudyResults({self['kind']}, {str(self.folder)!r}, {len(self.rows)} rows)"

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """Those of results.csv: what they are depends on the study."""
        path = self.folder / "results.csv"
        again = "run the study again, which writes it anew"
        require(path.is_file(), f"{path} is missing; {again}")
        whole = self.get(CSV_DIGEST) in (None, file_sha256(path))  # earlier versions wrote none
        require(whole, f"{path} is damaged or was edited; {again}")
        with path.open(newline="", encoding="utf-8") as file:
            return [{name: _number(x) for name, x in row.items()} for row in csv.DictReader(file)]

    def _rows(self) -> Sequence[Mapping[str, Any]]:
        return self.rows

    def _plots(self) -> Mapping[str, Callable[[], Any]]:
        """The figures as the study drew them."""
        files = sorted((self.folder / "plots").glob("*.png"))
        return {file.stem: lambda file=file: _picture(file) for file in files}


class TrainingResults(_Results):
    """The metrics of a training: those of metrics.jsonl.

    Attributes:
      rows: the logged values of each step, in order.
    """

    def __init__(self, rows: list[dict[str, Any]], folder: str | Path):
        super().__init__(rows[-1], folder)
        self.rows = rows

    def __repr__(self) -> str:
        last, parts = self.rows[-1], [f"step {self.rows[-1]['step']:,}"]
        losses = [row["loss"] for row in self.rows if is_finite(row["loss"])]
        if losses:
            parts.append(f"loss {losses[0]:.3f} to {losses[-1]:.3f}")
        if is_finite(last.get("skip_rate")):
            parts.append(f"skip rate {last['skip_rate']:.1%}")
        return f"TrainingResults({str(self.folder)!r}, {', '.join(parts)})"

    def _rows(self) -> Sequence[Mapping[str, Any]]:
        return self.rows

    def _plots(self) -> Mapping[str, Callable[[], Any]]:
        return {"curves": lambda: training_curves(self.folder / METRICS)}


def _value(name: str, run: Mapping[str, Any]) -> Any:
    return run["policy"]["label"] if name == "policy" else run.get(name)


def _of(name: str, runs: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The tasks, policies or seeds of runs, in their order."""
    return list(dict.fromkeys(_value(name, run) for run in runs))


def _drawing(figure: Figure) -> Callable[[], Any]:
    return lambda: figure.plot(**figure.data)


def _number(text: str) -> Any:
    """A cell of a CSV file: a number, True or False, None for an empty one, or text."""
    try:
        return json.loads(text.lower() if text in ("True", "False") else text or "null")
    except ValueError:
        return text


def _picture(file: Path) -> matplotlib.figure.Figure:
    """A figure that shows a PNG file, pixel by pixel."""
    from matplotlib.image import imread

    from dials_jax.reporting.figure import figure_at

    pixels = imread(file)
    height, width = pixels.shape[:2]
    with figure_at(None, width / 100, height / 100) as figure:
        figure.figimage(pixels)
    return figure
