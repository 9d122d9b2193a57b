"""Routers of another width (DIALS, Figure 6a): 256 or 1024 units instead of 512.

python train.py --config configs/llada/ablation_width.py --workdir runs/gsm8k/width-256 \\
    --router.d-hidden 256

Otherwise as router_gsm8k.py. Expected from the paper: hardly another trade-off. To compare, train
each width with several --objective.skip-weight, and give all workdirs to
configs/llada/sweep_ablations.py.
"""

import dataclasses

from configs.llada.router_gsm8k import get_config as published
from dials_jax.config import RouterConfig, TrainConfig


def get_config() -> TrainConfig:
    return dataclasses.replace(published(), router=RouterConfig(d_hidden=256))
