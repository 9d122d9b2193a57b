"""Dream-7B on HumanEval under full, static and random execution (Goel, Tables 1 and 3).

python eval.py --config configs/dream/sweep_humaneval.py --workdir runs/dream/humaneval \\
    --model Dream-v0-Base-7B --tasks.0.allow-code-execution

512 tokens in 512 steps at temperature 0.2 by Dream's sampler, as its scripts for the base model set
it: tokens of the least entropy first, top_p 0.95. The sweep executes what the model writes, and
asks for permission: docs/evaluation.md, "Code".
"""

from dataclasses import replace

from dials_jax import Dream
from dials_jax.config import EvalConfig
from dials_jax.evaluation.benchmark_tasks import humaneval


def get_config() -> EvalConfig:
    task = humaneval("data/humaneval_test.jsonl")
    return EvalConfig(
        model="Dream-v0-Base-7B",
        tasks=(replace(task, sampler=Dream(512, temperature=0.2, top_p=0.95)),),
        num_static=(2, 3, 4),
        num_random=(2, 3, 4),
        similarity_threshold=0.95,
        batch_size=32,
    )
