"""MDLM with 12 blocks (169.6 M parameters) on OpenWebText, from scratch: the heavy model.

    python prepare.py --config configs/mdlm/blocks_12.py       (once; see docs/data.md)
python train.py --config configs/mdlm/blocks_12.py --workdir runs/mdlm/blocks_12

On a pod, run the second command on every host, with --distributed. The sequences of a step are
split over all devices; if they do not fit in memory, --num-microbatches 8 takes an eighth of them
at a time. The settings are those of the papers.

Expected: a perplexity of at most 23.2 on OpenWebText's last 100,000 documents (Sahoo et al. 2024,
table 3), and a generative perplexity of 42.85 +- 0.71 in 1000 steps with `precision="float32"`
(Sedykh, table 1).
"""

from dials_jax.config import (
    CorpusData,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)
from dials_jax.models.families import mdlm


def openwebtext(model: ModelConfig, kind: str = "mdlm", **changes) -> TrainConfig:
    """Returns the settings that all models on OpenWebText share, with `changes`."""
    values = dict(
        model=model,
        objective=ObjectiveConfig(kind=kind),
        data=CorpusData(
            folder="data/openwebtext",
            dataset="Skylion007/openwebtext",
            tokenizer="data/gpt2_bpe",
            length=1024,
        ),
        optimizer=OptimizerConfig(
            learning_rate=3e-4,
            b1=0.9,
            b2=0.999,
            weight_decay=0.0,
            lr_schedule="constant",
            num_steps=1_000_000,
            warmup_steps=2500,
            ema=0.9999,
        ),
        batch_size=512,
        dropout=0.1,
        layout="unrolled",
        log_every=100,
        save_every=10_000,
    )
    return TrainConfig(**(values | changes))


def get_config() -> TrainConfig:
    return openwebtext(mdlm(12))
