"""MDLM with 12 blocks (169.6 M parameters) on OpenWebText, from scratch: the heavy model.

    python prepare.py --config configs/mdlm/blocks_12.py       (once; see docs/data.md)
python train.py --config configs/mdlm/blocks_12.py --workdir runs/mdlm/blocks_12

On a pod, the second command on every host, with --distributed. The sequences of a step are split
over all devices; if they do not fit, --num-microbatches 8 takes an eighth of them at a time.
Expected: at most 23.2 perplexity on OpenWebText's last 100,000 documents (Sahoo et al. 2024, table
3), and a generative perplexity of 42.85 +- 0.71 over 1000 steps with `precision="float32"` (Sedykh
et al., table 1). Settings are theirs.
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
    """The settings that all models of this folder share."""
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
