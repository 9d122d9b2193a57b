"""`python train.py --config FILE --workdir DIR`: as `dials train`, from a clone."""

from dials_jax.cli.train import train_command
from dials_jax.commands import run_as_process

if __name__ == "__main__":
    run_as_process(train_command)
