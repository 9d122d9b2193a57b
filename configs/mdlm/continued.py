"""A diffusion model that starts from the causal twin, as Dream did from Qwen2.5.

python train.py --config configs/mdlm/continued.py --workdir runs/mdlm/continued

Attention becomes bidirectional; a token is still predicted at the position to its left. Needs
runs/mdlm/causal. Expected: the loss of blocks_12.py in a fraction of its steps.
"""

from configs.mdlm.blocks_12 import openwebtext
from dials_jax.config import TrainConfig
from dials_jax.models.families import mdlm


def get_config() -> TrainConfig:
    return openwebtext(mdlm(12, right_shift=True), init_from="runs/mdlm/causal")
