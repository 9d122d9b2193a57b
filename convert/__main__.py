"""`python -m convert SRC DST`: as `dials convert`, from a clone."""

from dials_jax.cli.convert import convert_command
from dials_jax.commands import run_as_process

if __name__ == "__main__":
    run_as_process(convert_command)
