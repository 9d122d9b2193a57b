"""Trains a masked diffusion model from scratch, or DIALS routers on a frozen one.

python train.py --config configs/demo/model.py --workdir runs/model [--optimizer.num-steps 100]
"""

from dials_jax.commands import keep_programs, main, parse
from dials_jax.config import TrainConfig
from dials_jax.training.loop import train


def command() -> None:
    config, workdir = parse(TrainConfig, __doc__)
    keep_programs()
    train(config, workdir)


if __name__ == "__main__":
    main(command)
