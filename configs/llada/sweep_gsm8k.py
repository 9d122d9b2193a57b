"""LLaDA-8B on GSM8K under full, static, random and routed execution (DIALS, Tables 1 and 3).

python eval.py --config configs/llada/sweep_gsm8k.py --workdir runs/gsm8k/sweep \\
    --model LLaDA-8B-Base --routers runs/gsm8k/router-1

Five examples, the first of the training split (the harness draws others for every question), then
256 tokens in 256 steps and one block, by LLaDA's sampler at temperature 0.

Scores as the task gsm8k of lm-evaluation-harness (version 3) under "strict-match": an output counts
up to the first stop string, its first "####" is compared, and numbers without commas, dollar signs
and a period at the end. For its "flexible-extract", the last number of the output; the workdir
keeps all outputs, so nothing is generated again:

    --tasks.0.extract '(-?[$0-9.,]{2,})|(-?[0-9]+)' --tasks.0.match last

The papers do not say which of the two they report. Items longer than the task's lengths are left
out and counted in the results (none of the test split with GPT-2's tokenizer).
"""

from dials_jax.config import EvalConfig
from dials_jax.evaluation.benchmark_tasks import gsm8k


def get_config() -> EvalConfig:
    return EvalConfig(
        model="LLaDA-8B-Base",
        routers=("runs/gsm8k/router-1",),
        tasks=(gsm8k("data/gsm8k_test.jsonl", examples="data/gsm8k_train.jsonl"),),
        similarity_threshold=0.95,
        batch_size=32,
    )
