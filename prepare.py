"""`python prepare.py --config FILE`: as `dials prepare`, from a clone."""

from dials_jax.cli.prepare import prepare_command
from dials_jax.commands import run_command

if __name__ == "__main__":
    run_command(prepare_command)
