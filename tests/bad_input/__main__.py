"""Prints the counts of many cases by entry point, and every kind of failure with an example."""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from pathlib import Path

from tests.bad_input.entry_points import log as progress
from tests.bad_input.entry_points import run_all
from tests.bad_input.run import table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="entry points whose name holds this")
    given = parser.parse_args()
    logging.getLogger().setLevel(logging.ERROR)
    progress.setLevel(logging.INFO)
    progress.propagate = False
    progress.addHandler(logging.StreamHandler())
    start, processor = time.monotonic(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        tallies = run_all(Path(folder), given.cases, given.seed, given.only)
    print(table(tallies))
    seconds, used = time.monotonic() - start, time.process_time() - processor
    print(f"\nseed {given.seed}; {seconds:.0f} s, {used:.0f} s of CPU time")
    sys.exit(any(tally.failures for tally in tallies))


if __name__ == "__main__":
    main()
