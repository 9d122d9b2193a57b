"""The causal twin of the 12-block MDLM: the same blocks, trained to predict the next token.

python train.py --config configs/mdlm/causal.py --workdir runs/mdlm/causal

It scores the samples of the others, and continued.py starts from it. Expected: a perplexity of 17.5
on OpenWebText's last 100,000 documents (the autoregressive model of Sahoo et al. 2024, table 3).
"""

from configs.mdlm.blocks_12 import openwebtext
from dials_jax.config import TrainConfig
from dials_jax.models.families import mdlm


def get_config() -> TrainConfig:
    return openwebtext(mdlm(12, causal=True), "causal")
