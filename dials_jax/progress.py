"""Progress on standard error: a bar in a terminal, a line now and then in a log file; and, once the
first part of a run is done, how long the rest takes."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

LINE_SECONDS = 15  # between two lines of progress in a log file
LONG = 10.0  # seconds: of a shorter run no line says how long it takes


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


@contextlib.contextmanager
def still_at(what: str, say: Callable[[str], Any], every: float = LINE_SECONDS) -> Iterator[None]:
    """Says now and then that something without steps still goes on, and for how long."""
    begun, ended = time.monotonic(), threading.Event()

    def watch() -> None:
        while not ended.wait(every):
            say(f"{what}: {format_duration(time.monotonic() - begun)} so far")

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


class Pace:
    """Says once, after the first measured part of a run, how long the rest takes at this pace."""

    def __init__(self, total: int | float, label: str, say: Callable[[str], Any] = print):
        """Args: total: of what `measured` counts: steps, FLOPs or samples."""
        self.total, self.label, self.say = total, label, say
        self.done, self._said = 0.0, False

    def measured(self, amount: int | float, seconds: int | float) -> None:
        """A part has taken so many seconds, without compilation."""
        self.done += amount
        left = (self.total - self.done) * seconds / max(amount, 1e-9)
        if not self._said and left >= LONG and jax.process_index() == 0:
            self.say(f"{self.label}: about {format_duration(left)} at this pace")
        self._said = True


def format_bytes(count: int | float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def format_duration(seconds: int | float) -> str:
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} hours"
    return f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{max(seconds, 1):.0f} s"
