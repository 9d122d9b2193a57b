"""`python train.py --config FILE --workdir DIR`: as `dials train`, from a clone."""

from dials_jax.cli.train import train_command
from dials_jax.commands import run_command

if __name__ == "__main__":
    run_command(train_command)
