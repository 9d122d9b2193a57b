"""MDLM with 10 blocks on OpenWebText: a light model.

python train.py --config configs/mdlm/blocks_10.py --workdir runs/mdlm/blocks_10

Otherwise as blocks_12.py. Expected: a generative perplexity of 42.90 as the light model L of the
schedule L125,H750,L125; 12 blocks alone have 42.85 (Sedykh, table 1).
"""

from configs.mdlm.blocks_12 import openwebtext
from dials_jax.config import TrainConfig
from dials_jax.models.families import mdlm


def get_config() -> TrainConfig:
    return openwebtext(mdlm(10))
