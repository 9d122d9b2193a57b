"""MDLM with 4 blocks on a folder of text, trained for as long as 12 blocks: 8 minutes on one H200.

python train.py --config configs/mdlm/text_4_long.py --workdir runs/mdlm/text_4_long \\
    --data.paths data/text/train.jsonl.xz --data.tokenizer data/gpt2_bpe

A light model with the heavy one's training time instead of its number of steps. Expected:
docs/results/scheduling.md.
"""

from configs.mdlm.text_12 import text
from dials_jax.config import TrainConfig
from dials_jax.models.families import mdlm


def get_config() -> TrainConfig:
    return text(mdlm(4), num_steps=14_750)
