"""`python prepare.py --config FILE`: as `dials prepare`, from a clone."""

from dials_jax.cli.prepare import prepare_command
from dials_jax.commands import run_as_process

if __name__ == "__main__":
    run_as_process(prepare_command)
