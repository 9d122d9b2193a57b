"""The 12-block MDLM on text under LLaDA's objective.

python train.py --config configs/mdlm/text_llada.py --workdir runs/mdlm/text_llada \\
    --data.paths data/text/train.jsonl.xz --data.tokenizer data/gpt2_bpe

Settings as in text_12.py. Expected: a noisier loss, and an equally good model within noise.
"""

from configs.mdlm.text_12 import text
from dials_jax.config import TrainConfig
from dials_jax.models.families import mdlm


def get_config() -> TrainConfig:
    return text(mdlm(12), "llada")
