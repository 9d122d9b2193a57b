"""`dials lm-eval`: the command line of lm-evaluation-harness, with `--model dials`."""

from __future__ import annotations

from dials_jax.commands import keep_programs, run_command
from dials_jax.errors import require_packages


def harness_command() -> None:
    """Runs the harness."""
    require_packages("eval", "lm_eval")
    keep_programs()
    from lm_eval.__main__ import cli_evaluate

    import dials_jax.evaluation.lm_eval  # noqa: F401  registers the model

    cli_evaluate()


def lm_eval_command() -> None:
    """`dials-lm-eval`: the same, by its earlier name."""
    run_command(harness_command)
