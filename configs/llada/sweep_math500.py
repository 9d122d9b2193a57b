"""LLaDA-8B on MATH-500 under full, static, random and routed execution (DIALS, Tables 1 and 3).

python eval.py --config configs/llada/sweep_math500.py --workdir runs/math500/sweep \\
    --model LLaDA-8B-Base --routers runs/gsm8k/router-1

256 tokens in 256 steps and one block, zero-shot. Answers are compared by value, which needs
pip install 'dials_jax[math]'. No routers are trained for it; those of GSM8K may be evaluated.
"""

from dials_jax.config import EvalConfig
from dials_jax.evaluation.benchmark_tasks import math500


def get_config() -> EvalConfig:
    return EvalConfig(
        model="LLaDA-8B-Base",
        routers=("runs/gsm8k/router-1",),
        tasks=(math500("data/math500_test.jsonl"),),
        similarity_threshold=0.95,
        batch_size=32,
    )
