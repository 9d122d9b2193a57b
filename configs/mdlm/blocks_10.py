"""MDLM with 10 blocks on OpenWebText: a light model.

python train.py --config configs/mdlm/blocks_10.py --workdir runs/mdlm/blocks_10

Otherwise as blocks_12.py. Expected: as L in L125,H750,L125 a generative perplexity of
42.90 (Sedykh et al., table 1), against 42.85 of 12 blocks alone.
"""

from configs.mdlm.blocks_12 import openwebtext
from dials_jax.config import TrainConfig
from dials_jax.models.families import mdlm


def get_config() -> TrainConfig:
    return openwebtext(mdlm(10))
