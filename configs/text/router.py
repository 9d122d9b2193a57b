"""DIALS routers for the text model. One run per lambda: --objective.skip-weight.

python train.py --config configs/text/router.py --workdir runs/text/router \\
    --data.paths data/text/train.jsonl.xz --validation.paths data/text/validation.jsonl.xz
"""

from dials_jax.config import (
    ObjectiveConfig,
    OptimizerConfig,
    RouterConfig,
    TextData,
    TrainConfig,
)


def get_config() -> TrainConfig:
    return TrainConfig(
        backbone="runs/text/model",
        router=RouterConfig(d_hidden=128),
        # The first 128 tokens of a sequence are its prompt: they are never masked.
        data=TextData(
            paths=("data/text/train.jsonl.xz",),
            length=512,
            prompt_length=128,
            random_length_prob=0.0,
        ),
        validation=TextData(
            paths=("data/text/validation.jsonl.xz",),
            length=512,
            prompt_length=128,
            random_length_prob=0.0,
        ),
        validate_every=50,
        objective=ObjectiveConfig(skip_weight=1.0),
        # The paper's settings, but with a learning rate for a short run.
        optimizer=OptimizerConfig(learning_rate=5e-4, num_steps=350, warmup_steps=70),
        batch_size=64,
        log_every=10,
        save_every=200,
    )
