"""Evaluates a model under several policies, or studies model schedules, as the file says.

python eval.py --config configs/demo/sweep.py --workdir runs/sweep [--batch-size 64]
python eval.py --config configs/mdlm/study_search.py --workdir runs/search
"""

from dials_jax.commands import keep_programs, parse, run_command
from dials_jax.config import StudyConfig
from dials_jax.evaluation.sweep import sweep
from dials_jax.evaluation.task import EvalConfig
from dials_jax.stopping import keeping
from dials_jax.studies.study import run_study


def command() -> None:
    config, workdir = parse(EvalConfig | StudyConfig, __doc__)
    keep_programs()
    run = sweep if isinstance(config, EvalConfig) else run_study
    kept = f"results are saved in {workdir}; the same command continues with the rest"
    with keeping(lambda: kept):
        run(config, workdir)


if __name__ == "__main__":
    run_command(command)
