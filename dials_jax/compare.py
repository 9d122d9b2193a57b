"""`python -m dials_jax.compare`: as `dials compare`."""

from dials_jax.cli.compare import compare_command
from dials_jax.commands import run_as_process

if __name__ == "__main__":
    run_as_process(compare_command)
