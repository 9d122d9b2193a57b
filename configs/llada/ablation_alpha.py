"""Routers that aim at another share of skipped layers: alpha_target of DIALS (8).

python train.py --config configs/llada/ablation_alpha.py --workdir runs/gsm8k/alpha-0.25 \\
    --objective.target-skip-rate 0.25

Otherwise as router_gsm8k.py, where alpha_target is 0.5 as in all of the paper's runs; the paper
moves along the trade-off by lambda alone.
"""

import dataclasses

from configs.llada.router_gsm8k import get_config as published
from dials_jax.config import ObjectiveConfig, TrainConfig


def get_config() -> TrainConfig:
    objective = ObjectiveConfig(skip_weight=1.0, target_skip_rate=0.25)
    return dataclasses.replace(published(), objective=objective)
