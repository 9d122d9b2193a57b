"""`python eval.py --config FILE --workdir DIR`: as `dials eval`, from a clone."""

from dials_jax.cli.evaluate import eval_command
from dials_jax.commands import run_command

if __name__ == "__main__":
    run_command(eval_command)
