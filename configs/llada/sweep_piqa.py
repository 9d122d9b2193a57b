"""LLaDA-8B on PIQA under full, static, random and routed execution (DIALS, Tables 1 and 3).

python eval.py --config configs/llada/sweep_piqa.py --workdir runs/piqa/sweep \\
    --model LLaDA-8B-Base --routers runs/piqa/router-1

Likelihoods of the two solutions, 128 masked samples each, zero-shot. results.json also has the
accuracies per token and per character (the harness's acc_norm).
"""

from dials_jax.config import EvalConfig
from dials_jax.evaluation.benchmark_tasks import piqa


def get_config() -> EvalConfig:
    return EvalConfig(
        model="LLaDA-8B-Base",
        routers=("runs/piqa/router-1",),
        tasks=(piqa("data/piqa_validation.jsonl"),),
        similarity_threshold=0.95,
        batch_size=32,
    )
