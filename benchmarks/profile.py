"""Traces a program, and prints where its device time goes, by kind of kernel."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jax

# A kernel belongs to the first kind whose pattern matches its name.
KINDS = (
    ("attention", r"cudnn|fmha|flash|sdpa|attention"),
    ("matmuls", r"gemm|nvjet|cutlass|cublas|xmma|wgmma|dot|matmul"),
    ("copies to the host", r"MemcpyD2H"),
    ("copies", r"[Mm]emcpy|copy|[Mm]emset"),
    ("scatter, gather, slices", r"scatter|gather|dynamic_update|slice"),
    ("sort, top-k", r"sort|topk|TopK|top_k"),
    ("reductions", r"reduce"),
    ("other fusions", r""),
)


def read_device_events(folder: Path) -> list[tuple[str, float, float]]:
    """Reads (name, start, duration) of all kernels of a trace, in seconds, by start.

    Raises: FileNotFoundError if the folder holds no trace.
    """
    files = sorted(Path(folder).rglob("*.xplane.pb"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no trace")
    events = []
    for plane in jax.profiler.ProfileData.from_file(str(files[-1])).planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            if "Stream" in line.name:
                events += [(e.name, e.start_ns * 1e-9, e.duration_ns * 1e-9) for e in line.events]
    return sorted(events, key=lambda e: e[1])


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
        kind = next(kind for kind, pattern in KINDS if re.search(pattern, name))
        kinds[kind] += seconds
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
