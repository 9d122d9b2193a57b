"""Files that grow by a JSON object per line: the only reader of them, and the results of a run.

Results have a digest in every line, which shows damage.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from dials_jax import sharding
from dials_jax.errors import InputError, require
from dials_jax.files import finite, replacing, write_json
from dials_jax.stopping import meet
from dials_jax.workdir import read_mark

RECORDS = "runs.jsonl"
Agree = Callable[[Mapping[str, Any], Mapping[str, Any], Path], Mapping[str, Any]]
Check = Callable[[Any], Any]  # raises one of PLAIN_ERRORS for an object that is not a record
# What Python raises for values that are missing or have the wrong type.
PLAIN_ERRORS = (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError)


class Records:
    """Results of a run that may be stopped: one JSON object per line, written when measured.

    Every line ends with a short digest of the rest. A line that does not match its digest is set
    aside; who reads the records measures again what is missing without it.

    Attributes:
      all: the records so far, those of an earlier run first.
      identity: what they depend on.
    """

    def __init__(
        self,
        workdir: str | Path,
        identity: Mapping[str, Any],
        check: Check,
        mark: str,
        agree: Agree,
        before: tuple[Mapping[str, Any], Sequence[dict[str, Any]]] | None = None,
        name: str = RECORDS,
    ):
        """Continues what the workdir holds, or starts.

        Args:
          identity: what the results depend on; stored in the file called `mark`.
          check: raises for an object that is not a record.
          agree: gives the identity to continue with, from that of the workdir and the new one.
          before: identity and records of an earlier version, which stored them elsewhere.
          name: of the file of records.
        Raises: InputError if the workdir holds results that depend on something else.
        """
        workdir = Path(workdir)
        self.path = workdir / name
        identity = json.loads(json.dumps(identity))
        known = workdir / mark
        old = read_mark(known)
        lines = found = Lines.read(self.path, check)
        if old is None and before is not None:
            old, lines = before[0], Lines.of(self.path, before[1])
        require(  # a process killed while taking over earlier records has written the same lines
            known.exists() or not found.good or (lines is not found and found.lines == lines.lines),
            f"{workdir} holds {name} but no {mark} that says of what; put it back, or choose "
            "another place",
        )
        if old is not None:
            identity = dict(agree(old, identity, workdir))
        self.identity, self.all = identity, list(lines.good.values())

        def open_for_more():  # once all processes have read what is there
            lines.mend()
            for number, why in lines.odd.items():
                print(
                    f"{self.path}, line {number} {why}: it is set aside in {lines.aside.name}, and "
                    "what is missing without it is measured again",
                    file=sys.stderr,
                )
            if identity != old or not known.exists():
                write_json(known, identity, digest=True)

        facts = {"settings or weights": identity, f"records in {self.path}": self.all}
        sharding.require_same_everywhere(facts)
        sharding.on_first_process(open_for_more)

    def add(self, record: Mapping[str, Any]) -> None:
        """Every process calls this; the first one writes. NaN and infinity become null.

        Raises: Stopped, with the record kept, if several processes agree to end: see `meet`.
        """
        if jax.process_index() == 0:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(format_line(record) + "\n")
        self.all.append(dict(record))
        meet()


@contextmanager
def require_sound(path: Path, remedy: str) -> Iterator[None]:
    """Raises: InputError naming the file if values read inside are missing or have wrong types."""
    try:
        yield
    except InputError:
        raise
    except PLAIN_ERRORS as error:
        raise InputError(f"{path} is damaged ({error!r}); {remedy}") from error


@dataclasses.dataclass
class Lines:
    """The lines of a file of records, by number from 1.

    Attributes:
      lines: all of them; the last is empty, or half a line that a killed process left.
      good: the records.
      odd: what is wrong with the other lines.
      new: they are not written yet.
    """

    path: Path
    lines: list[bytes]
    good: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)
    odd: dict[int, str] = dataclasses.field(default_factory=dict)
    new: bool = False

    @classmethod
    def read(cls, path: Path, check: Check) -> Lines:
        """Reads a file, which may be missing. Args: check: raises for what is no record."""
        found = cls(path, path.read_bytes().split(b"\n") if path.exists() else [b""])
        seen = False  # Earlier versions wrote no digests; after a line with one all have one.
        for number, line in enumerate(found.lines[:-1], start=1):
            try:
                record, has_digest = parse_line(line)
                require(has_digest or not seen, "has lost its digest")
                _require_record(record, check)
            except InputError as error:
                found.odd[number] = str(error)
            else:
                found.good[number] = record
                seen = seen or has_digest
        return found

    @classmethod
    def of(cls, path: Path, records: Sequence[dict[str, Any]]) -> Lines:
        """Makes lines that are not written yet."""
        lines = [format_line(record).encode() for record in records]
        return cls(path, [*lines, b""], dict(enumerate(records, start=1)), new=True)

    @property
    def aside(self) -> Path:
        """The file beside it for the odd lines: `runs.odd.jsonl` for `runs.jsonl`."""
        return self.path.with_suffix(".odd.jsonl")

    def name_odd(self) -> str:
        """`line 3`, or `line 3 and 2 more`."""
        first, *rest = self.odd
        return f"line {first}" + (f" and {len(rest)} more" if rest else "")

    def mend(self) -> None:
        """Leaves only the good lines in the file, and moves the odd ones aside."""
        if self.odd:
            with self.aside.open("ab") as file:
                file.writelines(self.lines[number - 1] + b"\n" for number in self.odd)
        if self.new or self.lines[-1] or len(self.good) < len(self.lines) - 1:
            with replacing(self.path) as file:
                file.writelines(self.lines[number - 1] + b"\n" for number in self.good)


def format_line(record: Mapping[str, Any]) -> str:
    """Formats a record as one line of JSON that ends with the digest of the rest."""
    try:
        text = json.dumps(record, allow_nan=False)
    except ValueError:  # rare, and checking every number first would take longer than all the rest
        text = json.dumps(finite(record), allow_nan=False)
    return f'{text[:-1]}, "digest": "{_digest(text.encode())}"}}'


def parse_line(line: bytes) -> tuple[Any, bool]:
    """Returns the record of a line, and whether it had a digest. Raises: InputError if damaged."""
    match = re.fullmatch(rb'(.*), "digest": "([0-9a-f]+)"\}', line, re.DOTALL)
    text = match[1] + b"}" if match else line
    require(not match or match[2].decode() == _digest(text), "is damaged (its digest does not fit)")
    try:
        return json.loads(text), match is not None
    except (ValueError, RecursionError) as error:
        raise InputError(f"is not valid JSON ({error})") from error


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:8]


def _require_record(record: Any, check: Check) -> None:
    try:
        check(record)
    except PLAIN_ERRORS as error:
        raise InputError(f"is no record of this kind of run ({error!r})") from error


def require_texts(*values: Any) -> None:
    """Raises: TypeError for anything but text."""
    if not all(isinstance(value, str) for value in values):
        raise TypeError(f"{str(values)[:40]} is no text")


def require_numbers(values: Any, count: int | None = None) -> None:
    """Raises: ValueError unless it is a list of numbers and null (for NaN and infinity)."""
    plain = isinstance(values, list) and {type(x) for x in values} <= {int, float, type(None)}
    for value in values if plain else ():
        float(value or 0)  # an integer may be too large
    if not plain or count not in (None, len(values)):
        raise ValueError(f"{str(values)[:40]} is no list of {count or ''} numbers")
