"""MDLM with 4 blocks on OpenWebText: a light model.

python train.py --config configs/mdlm/blocks_4.py --workdir runs/mdlm/blocks_4

Otherwise as blocks_12.py. Expected: a generative perplexity of 44.31 +- 0.76 as the light model L
of the schedule L125,H750,L125; 12 blocks alone have 42.85 (Sedykh, table 1).
"""

from configs.mdlm.blocks_12 import openwebtext
from dials_jax.config import TrainConfig
from dials_jax.models.families import mdlm


def get_config() -> TrainConfig:
    return openwebtext(mdlm(4))
