"""Compares any two rows of sweeps by a paired test, and prints a matrix of all pairs per task.

dials compare runs/sweep
dials compare runs/seed0 runs/seed1 --holm --out runs/comparison
dials compare runs/llada runs/dream --only "llada: full" "dream: full"
"""

from __future__ import annotations

from typing import Any

from dials_jax.cli.options import Options


def compare_command(argv: list[str] | None = None) -> list[Any]:
    """Runs the command; returns the comparisons."""
    given = compare_options().read(argv)
    from dials_jax.evaluation.compare_sweeps import compare_sweeps

    return compare_sweeps(given.workdir, given.only, given.holm, given.out)


def compare_options() -> Options:
    parser = Options("compare", __doc__)
    parser.add_argument("workdir", nargs="+", metavar="WORKDIR", help="of dials eval")
    parser.add_argument("--holm", action="store_true", help="correct p for the number of pairs")
    parser.add_argument(
        "--only", nargs="+", metavar="ROW", default=(), help="compare these rows alone, by label"
    )
    parser.add_argument(
        "--out", metavar="FOLDER", help="also write comparison.csv with intervals there"
    )
    return parser
