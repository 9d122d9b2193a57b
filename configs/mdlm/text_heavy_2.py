"""A second 12-block MDLM on text that differs from the first only in its seed.

python train.py --config configs/mdlm/text_heavy_2.py --workdir runs/mdlm/text_heavy_2 \\
    --data.paths data/text/train.jsonl.xz --data.tokenizer data/gpt2_bpe

Expected: docs/results/scheduling.md.
"""

from configs.mdlm.text_12 import text
from dials_jax.config import TrainConfig
from dials_jax.models.families import mdlm


def get_config() -> TrainConfig:
    return text(mdlm(12), seed=1)
