"""MDLM with 12 blocks on a folder of text: 8 minutes on one H200.

python train.py --config configs/mdlm/text_12.py --workdir runs/mdlm/text_12 \\
    --data.paths data/text/train.jsonl.xz --data.tokenizer data/gpt2_bpe

Data: any .txt or .jsonl(.xz) files with a field "text", and GPT-2's vocab.json and merges.txt.
Training may stop at any step (--max-minutes 5), because the learning rate is constant and the
result is a moving average. Expected: docs/results/scheduling.md.
"""

from dials_jax.config import (
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TextData,
    TrainConfig,
)
from dials_jax.models.families import mdlm


def text(model: ModelConfig, kind: str = "mdlm", num_steps: int = 6900, **changes) -> TrainConfig:
    """Returns the settings that all models on text share, with `changes`.

    Learning rates are larger and steps fewer than on OpenWebText.
    """
    values = dict(
        model=model,
        objective=ObjectiveConfig(kind=kind),
        data=TextData(
            paths=("data/text/train.jsonl.xz",),
            tokenizer="data/gpt2_bpe",
            length=1024,
            random_length_prob=0.0,
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-3,
            b1=0.9,
            b2=0.99,
            weight_decay=0.1,
            lr_schedule="constant",
            num_steps=num_steps,
            warmup_steps=200,
            ema=0.9999,
        ),
        batch_size=32,
        layout="unrolled",
        log_every=20,
        save_every=2000,
    )
    return TrainConfig(**(values | changes))


def get_config() -> TrainConfig:
    return text(mdlm(12))
