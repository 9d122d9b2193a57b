"""A small LLaDA that learns to reverse, compare and sort digits, from scratch, on two CPU cores.

python train.py --config configs/demo/model.py --workdir runs/demo/model

Expected: at least 95 % exact match on held-out items, in about two minutes.
"""

from dials_jax.config import ArithmeticData, OptimizerConfig, TrainConfig
from dials_jax.models.families import llada_small


def get_config() -> TrainConfig:
    return TrainConfig(
        # The vocabulary: 0 is padding, 1 the end of text, 18 [MASK], the others are characters.
        model=llada_small(
            num_layers=6,
            d_model=96,
            vocab_size=19,
            mask_id=18,
            eos_id=1,
            pad_id=0,
            max_length=64,
            dtype="float32",
        ),
        data=ArithmeticData(),
        optimizer=OptimizerConfig(
            learning_rate=1.5e-3, b2=0.98, weight_decay=0.01, num_steps=2000, warmup_steps=100
        ),
        batch_size=64,
        log_every=50,
        save_every=500,
    )
