"""`dials lm-eval`: the command line of lm-evaluation-harness, with `--model dials`."""

from __future__ import annotations

import argparse

from dials_jax.commands import keep_programs, run_as_process
from dials_jax.errors import require_packages
from dials_jax.files import local_path, require_writable


def harness_command() -> None:
    """Runs the harness."""
    require_packages("eval", "lm_eval")
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-o", "--output_path")
    parser.add_argument("--include_path")
    parser.add_argument("-c", "--use_cache")
    given = parser.parse_known_args()[0]
    for name in ("include_path", "use_cache"):
        if path := getattr(given, name):
            local_path(path, f"--{name}")
    if out := given.output_path:  # the harness writes it at its very end
        folder = local_path(out, "--output_path")
        require_writable(folder if folder.suffix != ".json" else folder.parent, "--output_path")
    keep_programs()
    from lm_eval.__main__ import cli_evaluate

    import dials_jax.evaluation.lm_eval  # noqa: F401  registers the model

    cli_evaluate()


def lm_eval_command() -> None:
    """`dials-lm-eval`: the same, by its earlier name."""
    run_as_process(harness_command)
