"""LLaDA-8B on MMLU under full, static, random and routed execution (DIALS, Tables 1 and 3).

python eval.py --config configs/llada/sweep_mmlu.py --workdir runs/mmlu/sweep \\
    --model LLaDA-8B-Base --routers runs/mmlu/router-1

Five examples of the question's subject, and the likelihoods of A, B, C and D from one masked
sample, which is exact. The score is the mean over questions, as in the harness; results.json also
has the mean over the 57 subjects.
"""

from dials_jax.config import EvalConfig
from dials_jax.evaluation.benchmark_tasks import mmlu


def get_config() -> EvalConfig:
    return EvalConfig(
        model="LLaDA-8B-Base",
        routers=("runs/mmlu/router-1",),
        tasks=(mmlu("data/mmlu_test.jsonl", examples="data/mmlu_dev.jsonl"),),
        similarity_threshold=0.95,
        batch_size=32,
    )
