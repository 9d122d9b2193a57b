"""Trains a masked diffusion model from scratch, or DIALS routers on a frozen one.

dials train --config demo/model --workdir runs/model [--optimizer.num-steps 100]
dials train --config mdlm/blocks_12 --compile-for v5e:4x4
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from dials_jax.commands import CommandLine, keep_programs


def train_command() -> None:
    """Trains, and draws the curves of the training."""
    given = CommandLine.read(__doc__)
    if given.compile_for is not None:
        return fit_training(given)
    from dials_jax.config import TrainConfig
    from dials_jax.sharding import on_first_process
    from dials_jax.stopping import keeping
    from dials_jax.training.loop import train

    config = given.settings(TrainConfig)
    keep_programs()
    with given.open_workdir() as workdir:
        train(config, workdir)
        with keeping(lambda: f"training has ended, and its result is in {workdir}"):
            on_first_process(lambda: draw_curves(workdir))


def fit_training(given: CommandLine) -> None:
    """Compiles the step for a pod that need not be here."""
    from dials_jax.cli.fit import fit_or_exit
    from dials_jax.config import TrainConfig
    from dials_jax.pods.programs import training_knobs, training_programs

    config = given.settings(TrainConfig)
    fit_or_exit(config, given.compile_for, training_programs, training_knobs)


def draw_curves(workdir: Path) -> None:
    """Draws the training curves, if matplotlib is installed; on a pod it may be missing."""
    if find_spec("matplotlib"):
        from dials_jax.reporting.training_plots import training_curves

        path = workdir / "training.png"
        training_curves(workdir / "metrics.jsonl", path)
        print(f"curves: {path.absolute()}", flush=True)
