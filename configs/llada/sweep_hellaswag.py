"""LLaDA-8B on HellaSwag under full, static, random and routed execution (DIALS, Tables 1 and 3).

python eval.py --config configs/llada/sweep_hellaswag.py --workdir runs/hellaswag/sweep \\
    --model LLaDA-8B-Base --routers runs/hellaswag/router-1

Likelihoods of the endings per character (the harness's acc_norm), 128 masked samples each,
zero-shot. The total likelihoods are stored, too: --tasks.0.normalise none scores by them.
"""

from dials_jax.config import EvalConfig
from dials_jax.evaluation.benchmark_tasks import hellaswag


def get_config() -> EvalConfig:
    return EvalConfig(
        model="LLaDA-8B-Base",
        routers=("runs/hellaswag/router-1",),
        tasks=(hellaswag("data/hellaswag_validation.jsonl"),),
        similarity_threshold=0.95,
        batch_size=32,
    )
