"""`python -m dials_jax.compare`: as `dials compare`."""

from dials_jax.cli.compare import compare_command
from dials_jax.commands import run_command

if __name__ == "__main__":
    run_command(compare_command)
