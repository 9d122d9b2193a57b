"""The paper's routers beside those of its ablations (DIALS, Figures 4 and 6), on GSM8K.

python eval.py --config configs/llada/sweep_ablations.py --workdir runs/gsm8k/ablations \\
    --model LLaDA-8B-Base --routers runs/gsm8k/router-1 runs/gsm8k/width-256 runs/gsm8k/depth-4 \\
    runs/gsm8k/unscaled-1 runs/gsm8k/alpha-0.25

The routers come from router_gsm8k.py and ablation_*.py. A curve needs several of each, with other
--objective.skip-weight. The report draws accuracy against layers run, FLOPs of the whole model and
seconds.
"""

import dataclasses

from configs.llada.sweep_gsm8k import get_config as gsm8k
from dials_jax.config import EvalConfig


def get_config() -> EvalConfig:
    return dataclasses.replace(gsm8k(), num_static=(), num_random=())
