"""LLaDA-8B on ARC-Challenge under full, static, random and routed execution (DIALS, Table 1).

python eval.py --config configs/llada/sweep_arc_challenge.py --workdir runs/arc_challenge/sweep \\
    --model LLaDA-8B-Base --routers runs/arc_challenge/router-1

Likelihoods of the choices, 128 masked samples each, zero-shot. results.json also has the
accuracies per token and per character (the harness's acc_norm).
"""

from dials_jax.config import EvalConfig
from dials_jax.evaluation.benchmark_tasks import arc


def get_config() -> EvalConfig:
    return EvalConfig(
        model="LLaDA-8B-Base",
        routers=("runs/arc_challenge/router-1",),
        tasks=(arc("data/arc_challenge_test.jsonl"),),
        similarity_threshold=0.95,
        batch_size=32,
    )
