"""Progress on standard error: a bar in a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
from typing import Any

import jax

LINE_SECONDS = 15  # between two lines of progress in a log file


def progress_bar(total: int, start: int, what: str, unit: str = "step"):
    """Returns a tqdm bar on standard error; in a log file it is a line every `LINE_SECONDS`.

    Args:
      start: what an earlier run has done.
      what: is trained or made; the text before the bar.
    """
    from tqdm import tqdm

    live = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=start,
        desc=what,
        unit=unit,
        disable=jax.process_index() != 0,
        file=sys.stderr if live else ProgressLines(sys.stderr),
        mininterval=0.5 if live else LINE_SECONDS,
        miniters=1,  # read the clock after every one
    )


class ProgressLines:
    """A file for tqdm that writes every state of the bar as a line of its own."""

    def __init__(self, file: Any):
        self._file = file

    def write(self, text: str) -> None:
        if text.strip():
            self._file.write(text.strip() + "\n")

    def flush(self) -> None:
        self._file.flush()
