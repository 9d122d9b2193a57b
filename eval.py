"""Evaluates a model under full, static, random and routed execution, side by side.

python eval.py --config configs/demo/sweep.py --workdir runs/sweep [--batch-size 64]
"""

from dials_jax.commands import keep_programs, main, parse
from dials_jax.config import EvalConfig
from dials_jax.evaluation.sweep import sweep


def command() -> None:
    config, workdir = parse(EvalConfig, __doc__)
    keep_programs()
    sweep(config, workdir)


if __name__ == "__main__":
    main(command)
