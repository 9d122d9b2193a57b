"""Routers whose skip loss is not divided by the mask ratio (DIALS, Figure 4).

python train.py --config configs/llada/ablation_unscaled.py --workdir runs/gsm8k/unscaled-1

Otherwise as router_gsm8k.py. Expected from the paper: a worse trade-off, because layers are skipped
as often where nearly everything is masked. The scale of lambda differs too: train several.
"""

import dataclasses

from configs.llada.router_gsm8k import get_config as published
from dials_jax.config import ObjectiveConfig, TrainConfig


def get_config() -> TrainConfig:
    objective = ObjectiveConfig(skip_weight=1.0, scale_skip_by_mask_ratio=False)
    return dataclasses.replace(published(), objective=objective)
