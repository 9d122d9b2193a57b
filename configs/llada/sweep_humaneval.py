"""LLaDA-8B on HumanEval under full, static, random and routed execution (DIALS, Tables 1 and 3).

python eval.py --config configs/llada/sweep_humaneval.py --workdir runs/humaneval/sweep \\
    --model LLaDA-8B-Base --routers runs/mbpp/router-1 \\
    --tasks.0.allow-code-execution

256 tokens in 256 steps and one block, zero-shot, and the share of programs that pass their tests.
The sweep executes what the model writes, and asks for permission: docs/evaluation.md, "Code". No
routers are trained for it; those of MBPP may be evaluated.
"""

from dials_jax.config import EvalConfig
from dials_jax.evaluation.benchmark_tasks import humaneval


def get_config() -> EvalConfig:
    return EvalConfig(
        model="LLaDA-8B-Base",
        routers=("runs/mbpp/router-1",),
        tasks=(humaneval("data/humaneval_test.jsonl"),),
        similarity_threshold=0.95,
        batch_size=32,
    )
