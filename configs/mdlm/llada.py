"""The 12-block MDLM under LLaDA's objective.

python train.py --config configs/mdlm/llada.py --workdir runs/mdlm/llada

Mask ratios are drawn independently for each sequence, and [MASK] may be predicted. Expected: a
noisier loss than that of blocks_12.py, and an equally good model within noise: both objectives are
bounds of the same likelihood.
"""

from configs.mdlm.blocks_12 import openwebtext
from dials_jax.config import TrainConfig
from dials_jax.models.families import mdlm


def get_config() -> TrainConfig:
    return openwebtext(mdlm(12), "llada")
