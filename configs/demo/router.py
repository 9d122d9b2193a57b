"""DIALS routers on the demo's model. One run per lambda: --objective.skip-weight.

python train.py --config configs/demo/router.py --workdir runs/demo/router

Expected: in half a minute the skip rate rises from near zero to a level where the loss stays low.
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
        validation=ArithmeticData(),  # its held-out items
        validate_every=100,
        validation_batches=4,
        objective=ObjectiveConfig(skip_weight=1.0),
        # The paper's settings, but with a learning rate for a small model and a short run.
        optimizer=OptimizerConfig(learning_rate=3e-3, num_steps=400, warmup_steps=80),
        batch_size=64,
        log_every=10,
        save_every=200,
    )
