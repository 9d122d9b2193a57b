"""MDLM with 8 blocks on OpenWebText: a light model.

python train.py --config configs/mdlm/blocks_8.py --workdir runs/mdlm/blocks_8

Otherwise as blocks_12.py. Expected: as L in L125,H750,L125 a generative perplexity of
43.45 (Sedykh et al., table 1), against 42.85 of 12 blocks alone.
"""

from configs.mdlm.blocks_12 import openwebtext
from dials_jax.config import TrainConfig
from dials_jax.models.families import mdlm


def get_config() -> TrainConfig:
    return openwebtext(mdlm(8))
