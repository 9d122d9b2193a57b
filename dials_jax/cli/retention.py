"""Tables and figures of how much models retain when layers are skipped: Goel, Tables 1 to 3.

dials retention runs/retention/llada runs/retention/dream runs/retention/qwen2 \\
    --out runs/retention/report
"""

from __future__ import annotations

from typing import Any

from dials_jax.cli.options import Options


def retention_command(argv: list[str] | None = None) -> Any:
    """Runs the command; returns the report."""
    given = retention_options().read(argv)
    from dials_jax.evaluation.compare_retention import compare_retention

    return compare_retention(given.workdir, given.out)


def retention_options() -> Options:
    parser = Options("retention", __doc__)
    parser.add_argument("workdir", nargs="+", metavar="WORKDIR", help="of dials eval, one a model")
    parser.add_argument("--out", metavar="FOLDER", help="also write tables, figures and a page")
    return parser
