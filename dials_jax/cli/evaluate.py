"""Evaluates a model under several policies, evaluates it by lm-evaluation-harness, or studies model
schedules or representations, as the configuration says.

dials eval --config demo/sweep --workdir runs/sweep [--batch-size 64]
dials eval --config llada/harness --workdir runs/harness
dials eval --config mdlm/study_search --workdir runs/search
"""

from __future__ import annotations

from dials_jax.commands import CommandLine, keep_programs
from dials_jax.errors import require_packages


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
    workdir = given.folder()
    keep_programs()
    run = run_study
    if isinstance(config, EvalConfig):
        run = sweep
    elif isinstance(config, HarnessConfig):
        require_packages("eval", "lm_eval")
        from dials_jax.evaluation.harness_run import run_harness as run
    kept = f"results are saved in {workdir}; the same command continues with the rest"
    with keeping(lambda: kept):
        run(config, workdir)
