"""LLaDA-8B on MBPP under full, static, random and routed execution (DIALS, Tables 1 and 3).

python eval.py --config configs/llada/sweep_mbpp.py --workdir runs/mbpp/sweep \\
    --model LLaDA-8B-Base --routers runs/mbpp/router-1 \\
    --tasks.0.allow-code-execution

Three examples, 256 tokens in 256 steps and one block, and the share of programs that pass their
tests. The examples are those of lm-evaluation-harness, tasks 2, 3 and 4:

    grep -E '"task_id": [234],' mbpp.jsonl > data/mbpp_examples.jsonl

The sweep executes what the model writes, and asks for permission: docs/evaluation.md, "Code".
"""

from dials_jax.config import EvalConfig
from dials_jax.evaluation.benchmark_tasks import mbpp


def get_config() -> EvalConfig:
    return EvalConfig(
        model="LLaDA-8B-Base",
        routers=("runs/mbpp/router-1",),
        tasks=(mbpp("data/mbpp_test.jsonl", examples="data/mbpp_examples.jsonl"),),
        similarity_threshold=0.95,
        batch_size=32,
    )
