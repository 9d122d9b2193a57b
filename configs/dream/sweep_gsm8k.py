"""Dream-7B on GSM8K under full, static and random execution (Goel, Tables 1 and 3).

python eval.py --config configs/dream/sweep_gsm8k.py --workdir runs/dream/gsm8k \\
    --model Dream-v0-Base-7B

256 tokens in 256 steps at temperature 0 by Dream's sampler, as its scripts for the base model set
it: tokens of the least entropy first, top_p 0.95. Those scripts ask with eight examples that reason
(gsm8k_cot); here it is the task of configs/llada/sweep_gsm8k.py, with five.
--allow-adjacent True leaves out neighbours, too (Goel, Table 3).
"""

from dataclasses import replace

from dials_jax import Dream
from dials_jax.config import EvalConfig
from dials_jax.evaluation.benchmark_tasks import gsm8k


def get_config() -> EvalConfig:
    task = gsm8k("data/gsm8k_test.jsonl", examples="data/gsm8k_train.jsonl")
    return EvalConfig(
        model="Dream-v0-Base-7B",
        tasks=(replace(task, sampler=Dream(256, top_p=0.95)),),
        num_static=(2, 3, 4),
        num_random=(2, 3, 4),
        similarity_threshold=0.95,
        batch_size=32,
    )
