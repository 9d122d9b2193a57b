"""The time that a traced program spent on the device, by kind of kernel."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import jax

# A kernel is of the first kind whose pattern its name matches.
KINDS = (
    ("attention", r"cudnn|fmha|flash|sdpa|attention"),
    ("matrix products", r"gemm|nvjet|cutlass|cublas|xmma|wgmma|dot|swiglu"),
    ("copies to the host", r"MemcpyD2H"),
    ("copies", r"[Mm]emcpy|copy|[Mm]emset"),
    ("scatter, gather, slices", r"scatter|gather|dynamic_update|slice"),
    ("sort, top-k", r"sort|topk|TopK|top_k"),
    ("reductions", r"reduce"),
    ("other fusions", r""),
)


def device_events(folder: Path) -> list[tuple[str, float, float]]:
    """(name, start, duration) of all kernels in a trace, in seconds.

    Raises: FileNotFoundError without a trace in the folder.
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


def print_profile(folder: Path, calls: int, top: int = 25) -> None:
    """Prints milliseconds per model call by kind, and the slowest kernels."""
    events = device_events(folder)
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
    print(f"  {1e3 * span / calls:8.3f} ms a call, of which the device was busy {busy / span:.1%}")
    for kind, seconds in kinds.most_common():
        print(f"  {1e3 * seconds / calls:8.3f} ms  {seconds / span:6.1%}  {kind}")
    for name, seconds in names.most_common(top):
        print(
            f"    {1e3 * seconds / calls:8.4f} ms  {counts[name] / calls:7.1f} a call  {name[:90]}"
        )
