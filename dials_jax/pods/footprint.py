"""What a compiled program takes of a device: its memory, and what it exchanges with others.

Collectives are read from the text of the compiled program. One in a loop counts as often as the
loop runs; a loop without a fixed number of rounds counts as one round, and of several branches the
one that sends most.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np

from dials_jax.compiling import program_bytes

BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8,
}  # fmt: skip
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
MADE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
OUT_OF_MEMORY = r"Ran out of memory.*?([\d.]+)G.*?([\d.]+)G"


class Collective(NamedTuple):
    """One collective of a program.

    Attributes:
      size: bytes of the whole array: gathered, summed, or exchanged.
      group: how many devices take part.
    """

    kind: str
    size: int
    group: int

    @property
    def sent(self) -> float:
        """Bytes that each device sends, by the usual algorithms on a ring."""
        if self.kind == "collective-permute":
            return float(self.size)
        times = 2 if self.kind == "all-reduce" else 1
        return times * self.size * (self.group - 1) / self.group


class Footprint(NamedTuple):
    """What a program takes of one device.

    Attributes:
      kept: bytes of its arguments; of a training step what is there between steps: parameters,
        optimiser, average.
      peak: bytes at the same time.
      largest_collective: bytes of the largest array that one makes.
      collectives: each, and how often; None: the program cannot be read.
    """

    kept: int
    peak: int
    largest_collective: int | None
    collectives: Mapping[Collective, int] | None

    def sent(self) -> dict[str, tuple[float, int]]:
        """Bytes that a device sends, and how many collectives send them, by their kind."""
        found = dict.fromkeys(KINDS, (0.0, 0))
        for one, times in (self.collectives or {}).items():
            size, count = found[one.kind]
            found[one.kind] = (size + one.sent * times, count + times)
        return {kind: own for kind, own in found.items() if own[1]}


def read_footprint(compiled: jax.stages.Compiled) -> Footprint:
    """Reads a compiled program."""
    kept, peak = read_memory(compiled)
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError:  # libtpu may be newer than JAX
        return Footprint(kept, peak, None, None)
    return Footprint(kept, peak, read_largest_collective(text), count_collectives(text))


def read_memory(compiled: jax.stages.Compiled) -> tuple[int, int]:
    """Bytes on one device: of the arguments, and at the peak."""
    memory = compiled.memory_analysis()
    # A CPU's compiler leaves temporaries out of its peak.
    return memory.argument_size_in_bytes, max(memory.peak_memory_in_bytes, program_bytes(compiled))


def memory_that_is_missing(error: jax.errors.JaxRuntimeError) -> tuple[float, float]:
    """Bytes that a program needs and those that a device has, from the compiler's refusal.

    Raises: the error, if it is about something else.
    """
    needed = re.search(OUT_OF_MEMORY, str(error))
    if not needed:
        raise error
    return float(needed[1]) * 2**30, float(needed[2]) * 2**30


# ------------------------------------------------------------------------- the text of a program


def read_largest_collective(program: str) -> int:
    """Bytes of the largest array that a collective of a compiled program makes, from its text."""
    return max((max(_sizes(made)) for made, _, _ in MADE.findall(program)), default=0)


def _sizes(shapes: str) -> list[int]:
    """Bytes of the arrays that a text names."""
    return [
        BYTES.get(dtype, 4) * int(np.prod([int(n) for n in shape.split(",") if n], dtype=np.int64))
        for dtype, shape in ARRAY.findall(shapes)
    ] or [0]


def count_collectives(program: str) -> Counter[Collective]:
    """The collectives that one run of a program makes, each with how often."""
    lines_of = dict(_computations(program))
    entry = next((name for name, lines in lines_of.items() if lines[0].startswith("ENTRY")), None)
    return Counter() if entry is None else _count(entry, lines_of, {})


def _computations(program: str) -> Iterator[tuple[str, list[str]]]:
    """Yields the name and the lines of every computation, its head first."""
    lines: list[str] = []
    for line in program.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
            name, lines = head[1], [line]
        elif line == "}" and lines:
            yield name, lines
            lines = []
        elif lines:
            lines.append(line)


def _count(
    name: str, lines_of: Mapping[str, list[str]], known: dict[str, Counter[Collective]]
) -> Counter[Collective]:
    """Those of a computation and of all that it calls. Args: known: computations counted before."""
    if name in known:
        return known[name]
    total: Counter[Collective] = Counter()
    parts: set[tuple[str, Collective]] = set()  # of collectives in several fusions
    for line in lines_of.get(name, ()):
        if one := _collective(line):
            total[one] += 1
        elif called := re.search(r" fusion\(.*calls=%?([\w.-]+)", line):
            for key, one in _in_fusion(called[1], lines_of):
                total[one] += key not in parts
                parts.add(key)
        elif loop := re.search(r" while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)", line):
            rounds = _rounds(line, loop[1], lines_of)
            for one, times in _count(loop[2], lines_of, known).items():
                total[one] += rounds * times
        elif branches := _branches(line):
            counts = [_count(branch, lines_of, known) for branch in branches]
            total += max(counts, key=lambda c: sum(one.sent * n for one, n in c.items()))
        elif called := re.search(r" (?:call|async-start)\(.*(?:to_apply|calls)=%?([\w.-]+)", line):
            total += _count(called[1], lines_of, known)
    known[name] = total
    return total


def _in_fusion(
    name: str, lines_of: Mapping[str, list[str]]
) -> Iterator[tuple[tuple[str, Collective], Collective]]:
    """Yields the collectives of a fusion, each with what identifies it.

    A TPU runs a collective beside other work: it begins, continues and ends in several fusions,
    which all name it. A sum of which each device keeps its part is one that scatters.
    """
    for line in lines_of.get(name, ()):
        if one := _collective(line):
            if name.startswith("all-reduce-scatter"):
                yield (name, one), one._replace(kind="reduce-scatter")
            else:
                channel = re.search(r"channel_id=(\d+)", line)
                yield (channel[1] if channel else line, one), one


def _collective(line: str) -> Collective | None:
    made = MADE.search(line)
    if made is None:
        return None
    shapes, kind, starts = made.groups()
    size, group = sum(_sizes(shapes)), _group_size(line)
    if group < 2 and kind != "collective-permute":
        return None
    if kind == "reduce-scatter":  # a device's part, or beside it the whole, where it starts
        size = size * group / (1 + group) if starts else size * group
    elif starts and kind == "all-gather":  # the parts stand beside the whole
        size = size * group / (1 + group)
    elif starts and kind == "collective-permute":
        size = size / 2
    return Collective(kind, round(size), group)


def _group_size(line: str) -> int:
    """How many devices take part, as one of three notations says."""
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{('[^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return int(np.prod([int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2])]))
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
        return int(counted[1])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return listed[1].count(",") + 1
    return 1


def _rounds(line: str, condition: str, lines_of: Mapping[str, list[str]]) -> int:
    """How often a loop runs; 1 where that is not fixed."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', line):
        return int(known[1])
    text = "\n".join(lines_of.get(condition, ()))
    if below := re.search(r"ROOT .* compare\(.*%([\w.-]+)\), direction=LT", text):
        constant = re.search(rf"%{re.escape(below[1])} = s32\[\]\S* constant\((\d+)\)", text)
        return int(constant[1]) if constant else 1
    return 1


def _branches(line: str) -> list[str]:
    if " conditional(" not in line:
        return []
    if several := re.search(r"branch_computations=\{([^}]*)\}", line):
        return [name.strip().lstrip("%") for name in several[1].split(",")]
    return re.findall(r"(?:true|false)_computation=%?([\w.-]+)", line)
