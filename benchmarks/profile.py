"""Traces a program, and prints where its device time goes, by kind of kernel."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import jax

# A kernel belongs to the first kind whose pattern matches its name.
KINDS = (
    (
        "collectives",
        r"nccl|[Aa]ll_?[Rr]educe|all_gather|AllGather|ReduceScatter|psum|over_peers",
    ),
    ("attention", r"cudnn|fmha|flash|sdpa|attention"),
    ("matmuls", r"gemm|nvjet|cutlass|cublas|xmma|wgmma|dot|matmul"),
    ("copies to the host", r"MemcpyD2H"),
    ("copies", r"[Mm]emcpy|copy|[Mm]emset"),
    ("scatter, gather, slices", r"scatter|gather|dynamic_update|slice"),
    ("sort, top-k", r"sort|topk|TopK|top_k"),
    ("reductions", r"reduce"),
    ("other fusions", r""),
)


class Event(NamedTuple):
    """A kernel or a copy on a device."""

    name: str
    start: float  # seconds
    seconds: float


def read_events_of_devices(folder: Path) -> list[list[Event]]:
    """Reads all kernels of a trace, by start, for each GPU.

    Raises: FileNotFoundError if the folder holds no trace.
    """
    files = sorted(Path(folder).rglob("*.xplane.pb"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no trace")
    devices = defaultdict(list)
    for plane in jax.profiler.ProfileData.from_file(str(files[-1])).planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            if "Stream" in line.name:
                devices[plane.name] += [
                    Event(e.name, e.start_ns * 1e-9, e.duration_ns * 1e-9) for e in line.events
                ]
    return [sorted(events, key=lambda e: e.start) for _, events in sorted(devices.items())]


def read_device_events(folder: Path) -> list[Event]:
    """Reads all kernels of a trace, of all GPUs, by start."""
    events = [event for events in read_events_of_devices(folder) for event in events]
    return sorted(events, key=lambda e: e.start)


def kind_of(name: str) -> str:
    return next(kind for kind, pattern in KINDS if re.search(pattern, name))


class CollectiveShares(NamedTuple):
    """Shares of a device's time, from its first kernel to its last one."""

    running: float  # collectives
    alone: float  # collectives, with nothing else at the same time: not hidden


def collective_shares(events: Iterable[Event]) -> CollectiveShares | None:
    """The shares of collectives in the time of one device; None without events.

    A collective also runs while it waits for other devices.
    """
    events = list(events)
    if not events:
        return None
    is_collective = [kind_of(event.name) == "collectives" for event in events]
    pairs = list(zip(events, is_collective, strict=True))
    total = _covered(events)
    running = _covered(event for event, collective in pairs if collective)
    others = _covered(event for event, collective in pairs if not collective)
    span = max(e.start + e.seconds for e in events) - events[0].start
    return CollectiveShares(running / span, (total - others) / span)


def _covered(events: Iterable[Event]) -> float:
    """Seconds in which at least one of the events runs; they are sorted by start."""
    total, end = 0.0, float("-inf")
    for event in events:
        stop = event.start + event.seconds
        total += max(0.0, stop - max(event.start, end))
        end = max(end, stop)
    return total


def profile_calls(folder: Path, run: Callable[[], int]) -> None:
    """Traces `run` to a folder and prints the profile; `run` returns the number of model calls."""
    with jax.profiler.trace(str(folder)):
        num_calls = run()
    print_profile(folder, num_calls)


def print_profile(folder: Path, num_calls: int, top: int = 25) -> None:
    """Prints milliseconds per model call by kind, and the slowest kernels."""
    events = read_device_events(folder)
    kinds, names, counts = Counter(), Counter(), Counter()
    for name, _, seconds in events:
        kinds[kind_of(name)] += seconds
        names[name] += seconds
        counts[name] += 1
    if not events:
        print("the trace holds no kernels")
        return
    span = events[-1][1] + events[-1][2] - events[0][1]
    busy = sum(kinds.values())
    ms = 1e3 / num_calls  # milliseconds per call, of a second in all
    print(f"  {ms * span:8.3f} ms per call, of which the device was busy {busy / span:.1%}")
    for kind, seconds in kinds.most_common():
        print(f"  {ms * seconds:8.3f} ms  {seconds / span:6.1%}  {kind}")
    for name, seconds in names.most_common(top):
        per_call = counts[name] / num_calls
        print(f"    {ms * seconds:8.4f} ms  {per_call:7.1f} per call  {name[:90]}")
