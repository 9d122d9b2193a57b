"""Counts faults: commands that are killed, stopped, or left without room, and damaged files.

    python -m tests.faults --times 20 --seed 0 --out runs/faults

Every fault is injected `--times` times, at moments and places that the seed draws. Afterwards the
same command has to end with what a run without the fault gives, bit by bit, or to refuse in a line
that names the damaged file; and nothing that was reported as saved may be lost. The table is
printed, and every case stands in OUT/cases.jsonl. Linux; a full disk needs the right to mount.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path

QUICK = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "tests.faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, default=20, metavar="N", help="faults of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/faults"), help="is made anew")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, metavar="M", help="per line; then fewer faults"
    )
    parser.add_argument("--only", nargs="*", metavar="TEXT", help="lines whose names have a TEXT")
    return parser.parse_args()


def main() -> None:
    given = options()
    out = given.out.absolute()
    # JAX reads these when it is imported. Programs are compiled once, and are the same each time.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("XLA_FLAGS", QUICK)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(out / "programs"))
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HOME"] = str(out / "hf")
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # this process is forked, so it has no threads
    from tests.faults.count import count

    sys.exit(count(out, given.times, given.seed, given.only, given.minutes))


if __name__ == "__main__":
    main()
