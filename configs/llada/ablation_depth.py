"""Routers of four linear layers instead of two (DIALS, Figure 6b).

python train.py --config configs/llada/ablation_depth.py --workdir runs/gsm8k/depth-4

Otherwise as router_gsm8k.py. The paper does not describe the two layers between: here each is 512
units wide and followed by SiLU. Expected from the paper: hardly another trade-off.
"""

import dataclasses

from configs.llada.router_gsm8k import get_config as published
from dials_jax.config import RouterConfig, TrainConfig


def get_config() -> TrainConfig:
    return dataclasses.replace(published(), router=RouterConfig(depth=4))
