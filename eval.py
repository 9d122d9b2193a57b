"""Evaluates a model under several policies, evaluates it by lm-evaluation-harness, or studies model
schedules, as the file says.

python eval.py --config configs/demo/sweep.py --workdir runs/sweep [--batch-size 64]
python eval.py --config configs/llada/harness.py --workdir runs/harness
python eval.py --config configs/mdlm/study_search.py --workdir runs/search
"""

from dials_jax.commands import keep_programs, parse, run_command
from dials_jax.config import StudyConfig
from dials_jax.errors import require_packages
from dials_jax.evaluation.harness import HarnessConfig
from dials_jax.evaluation.sweep import sweep
from dials_jax.evaluation.task import EvalConfig
from dials_jax.stopping import keeping
from dials_jax.studies.study import run_study


def command() -> None:
    config, workdir = parse(EvalConfig | HarnessConfig | StudyConfig, __doc__)
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


if __name__ == "__main__":
    run_command(command)
