"""`python -m convert SRC DST`: as `dials convert`, from a clone."""

from dials_jax.cli.convert import convert_command
from dials_jax.commands import run_command

if __name__ == "__main__":
    run_command(convert_command)
