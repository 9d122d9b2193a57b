"""Tries cases at an entry point and counts how they end."""

from __future__ import annotations

import contextlib
import io
import signal
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings

from dials_jax.commands import run_command
from dials_jax.errors import InputError
from dials_jax.stopping import Stopped
from tests.bad_input.values import Case

LIMIT = 60  # seconds, of one case
OUTCOMES = ("one line", "accepted", "wrong, accepted", "traceback", "hang")
FAILURES = OUTCOMES[2:]
EVERYTHING = {"suppress_health_check": list(HealthCheck), "phases": [Phase.generate]}


class Hang(KeyboardInterrupt):
    """A case took longer than `LIMIT`. As Ctrl-C, nothing may swallow it."""


@dataclass(frozen=True)
class EntryPoint:
    """What reads an input.

    Attributes:
      cases: the strategy that draws them.
      take: reads the value of a case.
      weight: its share of the cases; less where a case is slow.
      right: a value that it has to accept; None: there is none at hand.
    """

    name: str
    cases: hypothesis.strategies.SearchStrategy[Case]
    take: Callable[[Any], Any]
    weight: float = 1.0
    right: Any = None


@dataclass
class Tally:
    """How the cases of one entry point ended.

    Attributes:
      failures: an example of each kind.
    """

    name: str
    counts: Counter = field(default_factory=Counter)
    failures: dict[str, str] = field(default_factory=dict)

    def add(self, case: Case, outcome: str, where: str) -> None:
        self.counts[outcome] += 1
        if outcome in FAILURES:
            self.failures.setdefault(f"{outcome}: {where}", repr(case.value)[:300])


def run_entry(entry: EntryPoint, num_cases: int, seed: int) -> Tally:
    """Draws cases and tries them; goes on after a failure, so that all kinds are found."""
    tally = Tally(entry.name)

    @hypothesis.seed(seed)
    @settings(max_examples=num_cases, database=None, deadline=None, **EVERYTHING)
    @given(entry.cases)
    def each(case):
        tally.add(case, *outcome_of(entry, case))

    each()
    return tally


@contextlib.contextmanager
def quiet():
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def outcome_of(entry: EntryPoint, case: Case) -> tuple[str, str]:
    """How a case ended, one of `OUTCOMES`, and where."""

    def stop(*_):
        raise Hang

    earlier = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try:
        with warnings.catch_warnings(), quiet():
            warnings.simplefilter("ignore")
            entry.take(case.value)
    except InputError as error:
        one_line = str(error).strip() and len(str(error).splitlines()) == 1
        return ("one line", "") if one_line else ("traceback", f"message {str(error)[:200]!r}")
    except Hang:
        return "hang", ""
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return "traceback", f"{type(error).__name__}: {str(error)[:120]} at {_place(error, frame)}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)
    return ("wrong, accepted", entry.name) if case.wrong else ("accepted", "")


def _place(error: BaseException, last: traceback.FrameSummary) -> str:
    ours = [f for f in traceback.extract_tb(error.__traceback__) if "/dials_jax/" in f.filename]
    frame = ours[-1] if ours else last
    return f"{frame.filename.rpartition('/dials_jax/')[2]}:{frame.lineno}"


def command(function: Callable[[], Any]) -> None:
    """Runs a command as its script does, and raises its one line as InputError.

    Raises: AssertionError unless what it wrote last is that line.
    """
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            run_command(function)
    except SystemExit as stop:
        if stop.code == Stopped().status:  # by `Hang`
            raise Hang from None
        lines = errors.getvalue().split("\n")
        assert stop.code in (1, 2) and lines[-1] == "", (stop.code, errors.getvalue()[-300:])
        found = [i for i, line in enumerate(lines) if line.startswith("error: ")]
        assert found == [len(lines) - 2], errors.getvalue()[-300:]
        raise InputError(lines[-2]) from None


def table(tallies: list[Tally]) -> str:
    """The counts as a table of Markdown."""
    rows = [["entry point", "cases", *OUTCOMES]]
    total = sum((tally.counts for tally in tallies), Counter())
    for name, counts in [*((t.name, t.counts) for t in tallies), ("all", total)]:
        rows.append([name, f"{counts.total():,}", *(f"{counts[x]:,}" for x in OUTCOMES)])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])
