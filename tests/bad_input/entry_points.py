"""All entry points, and their cases in one go."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from tests.bad_input.calls import call_entries
from tests.bad_input.commands import command_entries
from tests.bad_input.files import file_entries
from tests.bad_input.run import EntryPoint, Tally, run_entry
from tests.bad_input.world import make_world

log = logging.getLogger(__name__)


def entry_points(folder: Path) -> list[EntryPoint]:
    world = make_world(folder)
    return [*call_entries(world), *file_entries(world), *command_entries(world)]


def run_all(folder: Path, num_cases: int, seed: int, only: str = "") -> list[Tally]:
    """Tries about so many cases, shared by weight.

    Args:
      folder: an empty one, to work in.
      only: what the names of entry points hold.
    """
    entries = [entry for entry in entry_points(folder) if only in entry.name]
    total = sum(entry.weight for entry in entries)
    found = []
    for entry in entries:
        start = time.process_time()
        found.append(run_entry(entry, max(3, round(num_cases * entry.weight / total)), seed))
        log.info("%s: %.1f s of CPU time", entry.name, time.process_time() - start)
        for kind, example in found[-1].failures.items():
            log.info("FAILED %s\n    %s", kind, example)
    return found
