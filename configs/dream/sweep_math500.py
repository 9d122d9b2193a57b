"""Dream-7B on MATH-500 under full, static and random execution (Goel, Tables 1 and 3).

python eval.py --config configs/dream/sweep_math500.py --workdir runs/dream/math500 \\
    --model Dream-v0-Base-7B

512 tokens in 512 steps at temperature 0 by Dream's sampler, as its scripts for the base model set
it: tokens of the least entropy first, top_p 0.95. Those scripts ask with four examples; here it is
the task of configs/llada/sweep_math500.py, with none. Answers are compared by value, which needs
pip install 'dials_jax[math]'.
"""

from dataclasses import replace

from dials_jax import Dream
from dials_jax.config import EvalConfig
from dials_jax.evaluation.benchmark_tasks import math500


def get_config() -> EvalConfig:
    task = math500("data/math500_test.jsonl")
    return EvalConfig(
        model="Dream-v0-Base-7B",
        tasks=(replace(task, sampler=Dream(512, top_p=0.95)),),
        num_static=(2, 3, 4),
        num_random=(2, 3, 4),
        similarity_threshold=0.95,
        batch_size=32,
    )
