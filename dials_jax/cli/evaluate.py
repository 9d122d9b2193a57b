"""Evaluates a model under several policies, evaluates it by lm-evaluation-harness, or studies model
schedules or representations, as the configuration says.

dials eval --config demo/sweep --workdir runs/sweep [--batch-size 64]
dials eval --config llada/harness --workdir runs/harness
dials eval --config mdlm/study_search --workdir runs/search
dials eval --config demo/sweep --compile-for v5e:2x2
"""

from __future__ import annotations

from typing import Any

from dials_jax.commands import CommandLine, keep_programs
from dials_jax.errors import require, require_packages


def eval_command() -> None:
    """Runs the sweep, the harness or the study."""
    given = CommandLine.read(__doc__)
    from dials_jax.evaluation.harness import HarnessConfig
    from dials_jax.evaluation.sweep import sweep
    from dials_jax.evaluation.task import EvalConfig
    from dials_jax.stopping import keeping
    from dials_jax.studies.settings import AnyStudy
    from dials_jax.studies.study import run_study

    config = given.settings(EvalConfig | HarnessConfig | AnyStudy)
    if given.compile_for is not None:
        require(
            isinstance(config, EvalConfig),
            f"--compile-for is for sweeps, and this is a {type(config).__name__}; leave it out",
        )
        return fit_sweep(config, given.compile_for)
    run = run_study
    if isinstance(config, EvalConfig):
        run = sweep
    elif isinstance(config, HarnessConfig):
        require_packages("eval", "lm_eval")
        from dials_jax.evaluation.harness_run import run_harness as run
    keep_programs()
    with given.open_workdir() as workdir:
        kept = f"results are saved in {workdir}; the same command continues with the rest"
        with keeping(lambda: kept):
            run(config, workdir)


def fit_sweep(config: Any, pod: str) -> None:
    """Compiles the largest programs of a sweep for a pod that need not be here."""
    from dials_jax.cli.fit import fit_or_exit
    from dials_jax.pods.programs import sweep_knobs, sweep_programs

    fit_or_exit(config, pod, sweep_programs, sweep_knobs)
