"""`python eval.py --config FILE --workdir DIR`: as `dials eval`, from a clone."""

from dials_jax.cli.evaluate import eval_command
from dials_jax.commands import run_as_process

if __name__ == "__main__":
    run_as_process(eval_command)
