"""Where training metrics go: `metrics.jsonl`, TensorBoard and a progress bar."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import jax

from dials_jax.files import json_lines, named, replacing

log = logging.getLogger(__name__)

LINE_SECONDS = 15  # between two lines of progress in a log


class MetricsWriter:
    """Writes one JSON object per line; continuing at a step drops the lines of later steps.

    A line that is not the record of a step goes to `metrics.odd.jsonl`, with a warning. TensorBoard
    files are written too if tensorboardX is installed. Only process 0 writes.
    """

    def __init__(self, workdir: Path, step: int):
        self._active = jax.process_index() == 0
        if not self._active:
            return
        path = workdir / "metrics.jsonl"
        _drop_later(path, step)
        self._file = path.open("a", encoding="utf-8")
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


def _drop_later(path: Path, step: int) -> None:
    """Keeps the records up to a step; lines that are not records are set aside."""
    aside = path.with_name("metrics.odd.jsonl")
    odd = []
    with replacing(path) as kept:
        for number, line, record in json_lines(path) if path.exists() else ():
            at = (record or {}).get("step")
            if type(at) is not int or not 0 <= at < 2**63:
                odd.append((number, line))
            elif at <= step:
                kept.write(line)
        if odd:
            what = named([number for number, _ in odd])
            log.warning("%s, %s: no record of a step; moved to %s", path, what, aside)
            with aside.open("ab") as file:
                file.writelines(line for _, line in odd)


def _tensorboard(folder: Path, step: int):
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)


def progress_bar(total: int, start: int, what: str):
    """A progress bar on standard error; without a terminal, a line now and then."""
    from tqdm import tqdm

    live = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=start,
        desc=what,
        unit="step",
        disable=jax.process_index() != 0,
        file=sys.stderr if live else ProgressLines(sys.stderr),
        mininterval=0.5 if live else LINE_SECONDS,
        miniters=1,  # read the clock after every step
    )


class ProgressLines:
    """A file for tqdm that ends every state of the bar with a newline, as logs need."""

    def __init__(self, file: Any):
        self._file = file

    def write(self, text: str) -> None:
        if text.strip():
            self._file.write(text.strip() + "\n")

    def flush(self) -> None:
        self._file.flush()
