"""MDLM with 4 blocks on a folder of text: the light model, with as many steps as the heavy one.

python train.py --config configs/mdlm/text_4.py --workdir runs/mdlm/text_4 \\
    --data.paths data/text/train.jsonl.xz --data.tokenizer data/gpt2_bpe

Settings as in text_12.py; 4 minutes on one H200. Expected: docs/results/scheduling.md.
"""

from configs.mdlm.text_12 import text
from dials_jax.config import TrainConfig
from dials_jax.models.families import mdlm


def get_config() -> TrainConfig:
    return text(mdlm(4))
