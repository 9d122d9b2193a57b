"""DIALS routers on the demo's model. One run a lambda: --objective.skip-weight.

python train.py --config configs/demo/router.py --workdir runs/demo/router

Expected: the skip rate starts near zero and settles where the loss stays low, in half a minute.
"""

from dials_jax.config import (
    ArithmeticData,
    ObjectiveConfig,
    OptimizerConfig,
    RouterConfig,
    TrainConfig,
)


def get_config() -> TrainConfig:
    return TrainConfig(
        backbone="runs/demo/model",
        router=RouterConfig(d_hidden=32),
        data=ArithmeticData(),
        objective=ObjectiveConfig(skip_weight=0.1),
        # The paper's settings but for a rate that suits so small a model and so short a run.
        optimizer=OptimizerConfig(learning_rate=3e-3, num_steps=250, warmup_steps=50),
        batch_size=128,
        log_every=10,
        save_every=100,
    )
