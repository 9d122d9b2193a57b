"""Faults at random moments: commands that are killed, stopped, or left without room or right.

A workdir meets several faults one after the other, and then its command goes on to the end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from dials_jax.config import MeshConfig
from dials_jax.training.loop import train
from tests.bucket_servers import SERVERS
from tests.faults import damage, jobs, processes

GOOD = "good"
CHAIN = 4  # faults that one workdir meets
NAMES = (
    *("training of a model", "training of routers", "preparation", "sweep", "study", "lm-eval"),
)
MIRRORED = tuple(f"training of a model, mirrored in {scheme}" for scheme in SERVERS)
TOO_LATE = 1.0  # a command that ends well so many seconds after a signal was over before it
SAVES = 0.3  # seconds within which a tiny checkpoint is written
Case = tuple[str, str]  # what came of a fault, `GOOD` or what is wrong, and the words about it


@dataclass
class Counting:
    """What is there once for all lines.

    Attributes:
      out: where everything is made; `base` in it holds what commands read.
      whole: results of commands that nothing happened to, their seconds and bytes, by name.
    """

    out: Path
    times: int
    seed: int
    whole: dict[str, tuple[Any, float, int]] = field(default_factory=dict)

    @property
    def base(self) -> Path:
        return self.out / "base"

    def job(self, name: str) -> jobs.Job:
        """A command, after it has run without a fault: first to compile, then to be timed."""
        job = jobs.make_jobs(self.base)[name]
        if name not in self.whole:
            for turn in range(2):
                workdir = jobs.fresh(self.out / "whole" / f"{name}, {turn}")
                seconds = processes.do(partial(job.run, workdir), self.out / "whole.txt")
            size = sum(p.stat().st_size for p in workdir.rglob("*") if p.is_file())
            self.whole[name] = job.result(workdir), seconds, size
        return job


@dataclass(frozen=True)
class Fault:
    """A line of the table.

    Attributes:
      inject: one fault of a command: (the count, its job, workdir, random numbers). Returns: what
        is wrong, "" if nothing is, or None for a command that ended before the fault.
    """

    name: str
    job: str
    inject: Callable[[Counting, jobs.Job, Path, random.Random], str | None]
    place: Callable[[Counting], Path] = lambda counting: jobs.fresh(counting.out / "case")
    leave: Callable[[Path], None] = lambda workdir: None

    def cases(self, counting: Counting, rng: random.Random) -> list[Case]:
        """The faults of one workdir, until its command has ended."""
        job, workdir = counting.job(self.job), self.place(counting)
        try:
            found: list[Case] = []
            for _ in range(min(CHAIN, counting.times)):
                saved = job.saved(workdir)
                problem = self.inject(counting, job, workdir, rng)
                if problem is not None:
                    found.append((problem or GOOD, said_in(counting) if problem else ""))
                if lost := lost_of(job, saved, workdir):
                    return [("lost what was saved", lost), *found[1:]]
            kind, words = continued(counting, job, workdir)
            return found if kind == GOOD else [(kind, words)] * len(found)
        finally:
            self.leave(workdir)


def said_in(counting: Counting) -> str:
    return "".join(p.read_text()[-1500:] for p in counting.out.glob("case*.txt"))


def lost_of(job: jobs.Job, saved: dict[str, Any], workdir: Path) -> str:
    now = job.saved(workdir)
    if job.name.startswith("training"):  # older checkpoints are removed on purpose
        newest = max(saved, default="0")
        return "" if newest <= max(now, default="0") else f"step {newest}"
    return ", ".join(name for name in saved if now.get(name) != saved[name])[:500]


def continued(counting: Counting, job: jobs.Job, workdir: Path) -> Case:
    """Runs the command to its end after faults, and compares."""
    saved = job.saved(workdir)
    child = processes.start(partial(job.run, workdir), counting.out / "again.txt")
    if child.wait() != 0:
        return "does not go on", child.text()[-1500:]
    if job.name.startswith("training"):
        begins = f"from step {int(max(saved, default='0'))}"
        if begins not in child.text():
            return "lost what was saved", f"not {begins}: {child.text()[-500:]}"
    if lost := lost_of(job, saved, workdir):
        return "lost what was saved", lost
    found, expected = job.result(workdir), counting.whole[job.name][0]
    return (GOOD, "") if found == expected else (
        "another result", damage.difference(found, expected)
    )  # fmt: skip


def start(counting: Counting, job: jobs.Job, workdir: Path, **options: Any) -> processes.Child:
    return processes.start(partial(job.run, workdir), counting.out / "case.txt", **options)


def some_time(counting: Counting, job: jobs.Job, rng: random.Random) -> None:
    """Any moment of the command."""
    time.sleep(rng.uniform(0, counting.whole[job.name][1]))


# ------------------------------------------------------------------------------- killed and stopped


def kill(counting, job, workdir, rng) -> str | None:
    child = start(counting, job, workdir)
    some_time(counting, job, rng)
    child.send(signal.SIGKILL)
    return "" if child.wait() == -signal.SIGKILL else None


def unfinished_save(workdir: Path) -> Path | None:
    """Where the next checkpoint is written, without what a kill has left; None: all are there."""
    left = [s for s in range(1, jobs.STEPS + 1) if s % jobs.SAVE_EVERY == 0]
    left = [s for s in left if f"{s:08d}" > max(jobs.checkpoints(workdir), default="0")]
    return jobs.fresh(workdir / "checkpoints" / f"{left[0]:08d}.partial") if left else None


def kill_save(counting, job, workdir, rng) -> str | None:
    """Kills within a save: while a checkpoint has not got its final name."""
    unfinished = unfinished_save(workdir)
    if unfinished is None:
        return None
    child = start(counting, job, workdir)
    child.wait_until(unfinished.exists)
    time.sleep(rng.uniform(0, SAVES))
    child.send(signal.SIGKILL)
    killed = child.wait() == -signal.SIGKILL
    return "" if killed and unfinished.exists() else None


def terminate(counting, job, workdir, rng) -> str | None:
    child = start(counting, job, workdir)
    some_time(counting, job, rng)
    sent, running = time.monotonic(), child.send(signal.SIGTERM)
    if child.wait() == 0 or not running:
        return "SIGTERM is not obeyed (0)" if time.monotonic() - sent > TOO_LATE else None
    if child.status == -signal.SIGTERM and not child.text():  # the command had not begun
        return None
    obeyed = child.status == 143 and child.last_line().startswith("stopped")
    return "" if obeyed else f"SIGTERM is not obeyed ({child.status})"


def lose_machine(inject: Callable) -> Callable:
    """After the fault the workdir is lost: another machine goes on with the copy in the bucket."""

    def lose(counting, job, workdir, rng) -> str | None:
        problem = inject(counting, job, workdir, rng)
        said, noted = (counting.out / "case.txt").read_text(), jobs.noted(workdir)
        here = jobs.checkpoints(workdir)
        ended = re.search("copied to [a-z0-9]+://", said) is not None
        if lost := lost_of(job, here if ended else noted, jobs.fresh(workdir)):
            return f"lost what was copied ({lost})"
        if "is saved in" in said and not ended:
            return "is saved and not copied"
        return problem

    return lose


def own_machine(counting: Counting) -> Path:
    """A workdir with a name of its own, of which the bucket knows nothing."""
    return Path(tempfile.mkdtemp(prefix="machine-", dir=counting.out))


def pair_job(base: Path, name: str) -> jobs.Job:
    """A command of two processes; each has a part of every batch."""
    job = jobs.make_jobs(base)[name]
    if not name.startswith("training"):
        return job  # evaluation has no mesh to name
    split = jobs.training(base, mesh=MeshConfig(data=2))
    return dataclasses.replace(job, run=partial(train, split))


def count_lines(workdir: Path) -> int:
    """Of the log of a training, or of the records of an evaluation."""
    logs = ("metrics.jsonl", "runs.jsonl")
    # Not rglob(): it raises where a folder is renamed in the meantime.
    files = [Path(folder, n) for folder, _, names in os.walk(workdir) for n in names if n in logs]
    return sum(path.read_bytes().count(b"\n") for path in files)


def has_more_lines(workdir: Path, lines: int) -> bool:
    return count_lines(workdir) > lines


def whole_pair(counting: Counting, job: jobs.Job, both: Callable) -> tuple[Any, float, int]:
    """What two make of a command to which nothing happens: sums have an order of their own."""
    name = f"{job.name} by two"
    if name not in counting.whole:
        for _ in range(2):
            workdir = jobs.fresh(counting.out / "whole" / name)
            children = both(workdir)
            assert [x.wait() for x in children] == [0, 0], children[0].text()[-2000:]
            seconds = time.monotonic() - children[0].began
        counting.whole[name] = job.result(workdir), seconds, 0
    return counting.whole[name]


def of_two(counting: Counting, rng: random.Random, name: str, inject: Callable) -> list[Case]:
    """Faults of two processes that share a workdir, which then go on to the end.

    Args:
      inject: one fault: (how to start both, job, workdir, seconds of a whole run, random numbers).
        Returns: as that of `Fault`.
    """
    job, logs = pair_job(counting.base, name), [counting.out / f"case{n}.txt" for n in range(2)]

    def both(workdir: Path) -> list[processes.Child]:
        return processes.pair(lambda: job.run(workdir), logs)

    expected, seconds, _ = whole_pair(counting, job, both)
    workdir, found = jobs.fresh(counting.out / "case"), []
    for _ in range(CHAIN):
        saved = job.saved(workdir)
        problem = inject(both, job, workdir, seconds, rng)
        if problem is None:
            break
        if problem:
            return [*found, (problem, said_in(counting))]
        if lost := lost_of(job, saved, workdir):
            return [*found, ("lost what was saved", lost)]
        found.append((GOOD, ""))
    children = both(workdir)
    if [x.wait() for x in children] != [0, 0]:
        return [("does not go on", said_in(counting))] * len(found)
    result = job.result(workdir)
    same = result == expected
    return found if same else [("another result", damage.difference(result, expected))] * len(found)


def stop_one_of_two(both, job, workdir, seconds, rng) -> str | None:
    """SIGTERM to one of two processes: both end after the same step or batch, which is kept."""
    lines = count_lines(workdir)
    children = both(workdir)
    children[0].wait_until(partial(has_more_lines, workdir, lines))
    time.sleep(rng.uniform(0, 0.2 * seconds))
    children[rng.randrange(2)].send(signal.SIGTERM)
    statuses = [x.wait() for x in children]
    if statuses == [0, 0]:
        return None
    said = [x.last_line() for x in children]
    kept = "is saved in" if job.name.startswith("training") else "stopped"
    if statuses != [143, 143] or not all(kept in line for line in said):
        return f"not both end ({statuses})"
    return "" if said[0] == said[1] else f"they say different things: {said}"


def kill_one_of_two_in_a_save(both, job, workdir, seconds, rng) -> str | None:
    """SIGKILL to one of two processes while a checkpoint has not got its final name."""
    unfinished = unfinished_save(workdir)
    if unfinished is None:
        return None
    children = both(workdir)
    children[0].wait_until(unfinished.exists)
    time.sleep(rng.uniform(0, SAVES))
    killed = children[rng.randrange(2)]
    killed.send(signal.SIGKILL)
    died, within = killed.wait() == -signal.SIGKILL, unfinished.exists()
    for child in children:  # JAX ends the other one, too, after a while
        child.send(signal.SIGKILL)
        child.wait()
    return "" if died and within else None


# --------------------------------------------------------------------------- no room, right or lock


def one_line(child: processes.Child) -> str:
    """What is wrong with the end of a command that had to fail; "" if it is one clear line."""
    if "Traceback" in child.text():
        return f"a traceback ({child.status})"
    clear = child.status in (1, 2) and child.last_line().startswith("error: ")
    return "" if clear else f"no clear line ({child.status})"


def small_disk(counting: Counting) -> Path:
    """A disk of memory."""
    disk = counting.out / "disk"
    disk.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(disk)], check=True)
    return disk / "case"


def leave_disk(workdir: Path) -> None:
    subprocess.run(["umount", "-l", str(workdir.parent)], check=True)


def fill_disk(counting, job, workdir, rng) -> str | None:
    """Leaves room for a part of what is still to be written; afterwards there is room again."""
    disk = workdir.parent
    room = os.statvfs(disk)
    used = (room.f_blocks - room.f_bfree) * room.f_frsize
    size = int(used + 8192 + counting.whole[job.name][2] * rng.uniform(0.02, 0.9))
    resize = ["mount", "-o", f"remount,size={size}", str(disk)]
    subprocess.run(resize, check=True, stderr=subprocess.DEVNULL)
    child = start(counting, job, workdir)
    child.wait()
    subprocess.run(["mount", "-o", "remount,size=1g", str(disk)], check=True)
    return None if child.status == 0 else one_line(child)


def own_place(counting: Counting) -> Path:
    """A workdir in a folder that loses the right to be written with it."""
    place = jobs.fresh(counting.out / "case")
    (place / "work").mkdir(parents=True)
    return place / "work"


def allow(place: Path, write: bool) -> None:
    """Gives the right to write in all folders, or takes it, while a command may add and remove."""
    with contextlib.suppress(FileNotFoundError):
        place.chmod(0o755 if write else 0o555)
        for inside in place.iterdir():
            if inside.is_dir() and not inside.is_symlink():
                allow(inside, write)


def make_read_only(counting, job, workdir, rng) -> str | None:
    """All folders lose the right to be written: before the command, or at any moment."""
    if rng.random() < 0.25:
        allow(workdir.parent, False)
    child = start(counting, job, workdir, plain_user=True)
    some_time(counting, job, rng)
    allow(workdir.parent, False)
    child.wait()
    allow(workdir.parent, True)
    return None if child.status == 0 else one_line(child)


def come_again(counting: Counting, rng: random.Random, name: str) -> list[Case]:
    """The same command comes while it works, at several moments."""
    job, workdir = counting.job(name), jobs.fresh(counting.out / "case")
    first, found = start(counting, job, workdir), []
    moments = sorted(rng.uniform(0, counting.whole[name][1]) for _ in range(CHAIN - 1))
    for number, moment in enumerate((0.0, *moments)):  # 0: at once, and either may be the first
        while first.running() and time.monotonic() - first.began < moment:
            time.sleep(0.002)
        # A log of its own: after two have changed places the other one still writes.
        second = processes.start(partial(job.run, workdir), counting.out / f"case2-{number}.txt")
        while first.running() and second.running():
            time.sleep(0.002)
        if first.status:  # the second one was faster
            first, second = second, first
        overlapped = first.running()
        if second.wait() and (one_line(second) or "is in use by" not in second.last_line()):
            first.send(signal.SIGKILL)  # or it would work in the next case's folder
            first.wait()
            return [*found, (f"dies ({second.status})", second.text()[-1500:])]
        if overlapped and second.status:
            found.append((GOOD, ""))
    if first.wait():
        return [(f"dies ({first.status})", first.text()[-1500:])]
    result, expected = job.result(workdir), counting.whole[name][0]
    same = result == expected
    return found if same else [("another result", damage.difference(result, expected))] * len(found)


def make_faults() -> dict[str, Callable[[Counting, random.Random], list[Case]]]:
    """What makes some cases of each line of the table."""
    faults = [
        *(Fault(f"SIGKILL, {name}", name, kill) for name in NAMES),
        Fault("SIGKILL during a save, training of a model", NAMES[0], kill_save),
        *(Fault(f"SIGTERM, {name}", name, terminate) for name in NAMES),
        *(
            Fault(f"{signal}, {name}", name, lose_machine(inject), own_machine, shutil.rmtree)
            for name in MIRRORED
            for signal, inject in (("SIGKILL", kill), ("SIGTERM", terminate))
        ),
        *(Fault(f"disk full, {name}", name, fill_disk, small_disk, leave_disk) for name in NAMES),
        *(Fault(f"read-only workdir, {name}", name, make_read_only, own_place) for name in NAMES),
    ]
    return {
        **{fault.name: fault.cases for fault in faults},
        **{
            f"SIGTERM to one of two processes, {name}": partial(
                of_two, name=name, inject=stop_one_of_two
            )
            for name in ("training of a model", "sweep", "study", "lm-eval")
        },
        "SIGKILL to one of two processes during a save, training of a model": partial(
            of_two, name=NAMES[0], inject=kill_one_of_two_in_a_save
        ),
        **{
            f"two processes on one workdir, {name}": partial(come_again, name=name)
            for name in NAMES
        },
    }
