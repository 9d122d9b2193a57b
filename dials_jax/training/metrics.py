"""Where training metrics go: `metrics.jsonl`, TensorBoard and a progress bar."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax

LINE_SECONDS = 15  # between two lines of progress in a log


class MetricsWriter:
    """One JSON object a line; continuing at a step drops what was written after it.

    TensorBoard files are written too where tensorboardX is installed. Only process 0 writes.
    """

    def __init__(self, workdir: Path, step: int):
        self._active = jax.process_index() == 0
        if not self._active:
            return
        path = workdir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if _step_of(line) <= step]
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(line + "\n" for line in kept))
        temporary.replace(path)
        self._file = path.open("a")
        self._board = _tensorboard(workdir / "tensorboard", step)

    def write(self, step: int, values: dict[str, float]) -> None:
        if not self._active:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        if self._active:
            self._file.close()
            if self._board:
                self._board.close()


def _step_of(line: str) -> float:
    """The step of a line; a line cut short by a kill counts as later than everything."""
    try:
        return float(json.loads(line)["step"])
    except json.JSONDecodeError:
        return float("inf")


def _tensorboard(folder: Path, step: int):
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)


def progress_bar(total: int, start: int, what: str):
    """A bar on standard error with the time left; now and then a line where it is no terminal."""
    from tqdm import tqdm

    live = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=start,
        desc=what,
        unit="step",
        disable=jax.process_index() != 0,
        file=sys.stderr if live else Lines(sys.stderr),
        mininterval=0.5 if live else LINE_SECONDS,
        miniters=1,  # look at the clock after every step, so that nothing is printed in between
    )


class Lines:
    """A file for tqdm that ends every state of the bar with a newline, for logs."""

    def __init__(self, file: Any):
        self._file = file

    def write(self, text: str) -> None:
        if text.strip():
            self._file.write(text.strip() + "\n")

    def flush(self) -> None:
        self._file.flush()
