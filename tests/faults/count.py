"""Injects every fault, judges what comes of it, and prints the tables."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from dials_jax.buckets import PACKAGES
from tests.bucket_servers import SERVERS, bucket_servers
from tests.faults import damage, jobs, moments, processes, targets
from tests.faults.moments import GOOD, Counting


def count(out: Path, times: int, seed: int, only: list[str] | None, minutes: float) -> int:
    """Returns: the number of lines with a case that is not as it should be, or with too few."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    counting = Counting(out, times, seed)
    processes.do(lambda: jobs.make_base(counting.base), out / "base.txt")

    def wanted(name: str) -> bool:
        return not only or any(text in name for text in only)

    print(f"{times} times each, seed {seed}\n", flush=True)
    faults = {name: make for name, make in moments.make_faults().items() if wanted(name)}
    schemes = [scheme for scheme in SERVERS if any(f"in {scheme}" in name for name in faults)]
    with bucket_servers(schemes):
        for scheme in schemes:
            import_module(PACKAGES[scheme][1])  # once: commands are forks of this process
        bad = count_moments(counting, faults, minutes)
    chosen = [t for t in targets.make_targets(counting.base) if wanted(f"damaged: {t.name}")]
    return bad + count_damage(counting, chosen)


def count_moments(counting: Counting, faults: dict[str, Callable], minutes: float) -> int:
    bad, times = 0, counting.times
    if faults:
        print("| fault | injected | as it should be | otherwise |\n| --- | --- | --- | --- |")
    for name, make in faults.items():
        rng, found = random.Random(f"{counting.seed} {name}"), []
        end = time.monotonic() + 60 * minutes
        for _ in range(3 * times):
            if len(found) < times and time.monotonic() < end:
                new = make(counting, rng)
                note(counting.out, name, new)
                found += new
        kinds = Counter(kind for kind, _ in found)
        good = kinds.pop(GOOD, 0)
        bad += good < max(len(found), times)
        print(f"| {name} | {len(found)} | {good} | {listed(kinds)} |", flush=True)
    return bad


def listed(kinds: Counter) -> str:
    return ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())


def note(out: Path, line: str, cases: list[moments.Case]) -> None:
    with (out / "cases.jsonl").open("a") as file:
        for kind, words in cases:
            file.write(json.dumps({"line": line, "case": kind, "words": words}) + "\n")


# ------------------------------------------------------------------------------------ damaged files


def count_damage(counting: Counting, chosen: list[targets.Target]) -> int:
    if not chosen:
        return 0
    targets.make_states(counting.base, counting.out / "states")
    bad = 0
    print(f"\n| file | {' | '.join(damage.DAMAGES)} |\n| --- | --- | --- | --- |")
    for target in chosen:
        answers = counting.out / "answers.json"
        processes.do(partial(damage_all, counting, target, answers), counting.out / "damage.txt")
        cells = []
        for how, found in json.loads(answers.read_text()).items():
            note(counting.out, f"{how}: {target.name}", found)
            kinds = Counter(kind for kind, _ in found)
            good = sum(kinds[kind] for kind in damage.GOOD)
            bad += good < counting.times
            cells.append(f"{good} of {len(found)}: {listed(kinds)}")
        print(f"| {target.name} | {' | '.join(cells)} |", flush=True)
    return bad


def damage_all(counting: Counting, target: targets.Target, answers: Path) -> None:
    """All cases of a kind of file, in one process, so that nothing is compiled twice."""
    rng = random.Random(f"{counting.seed} {target.name}")
    state, copy = counting.out / "states" / target.state, counting.out / "copy"
    expected = target.use(damage.copy_of(state, copy))
    found: dict[str, list[Any]] = {how: [] for how in damage.DAMAGES}
    for how, harm in damage.DAMAGES.items():
        for _ in range(counting.times):
            damage.copy_of(state, copy)
            if target.noted:
                target.use(copy)
            file = rng.choice(target.found(copy))
            what = harm(file, rng)
            kind, words = damage.outcome(target.use, copy, file, expected)
            found[how].append((kind, f"{file.relative_to(copy)}, {what}: {words}"))
    answers.write_text(json.dumps(found))
