"""A second 12-block MDLM that differs from the first only in its seed.

python train.py --config configs/mdlm/heavy_2.py --workdir runs/mdlm/heavy_2

Two such models differ only by chance: the baseline of the KL divergence between a heavy and a light
one (Sedykh, section 3.4). Expected: as blocks_12.py.
"""

from configs.mdlm.blocks_12 import openwebtext
from dials_jax.config import TrainConfig
from dials_jax.models.families import mdlm


def get_config() -> TrainConfig:
    return openwebtext(mdlm(12), seed=1)
