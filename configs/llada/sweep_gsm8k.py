"""LLaDA-8B on GSM8K under full, static, random and routed execution.

python eval.py --config configs/llada/sweep_gsm8k.py --workdir runs/gsm8k/sweep \\
    --model LLaDA-8B-Base --routers runs/gsm8k/router-1

Generation as in DIALS, table 3: 256 tokens in 256 steps and one block, by LLaDA's sampler at
temperature 0. Zero-shot; put few-shot examples into the prompts for the paper's five.

Scored as the task gsm8k of lm-evaluation-harness (version 3) by "strict-match": the output is cut
at the first stop string, and the number after its first "####" is compared, without commas, dollar
signs and a final period. For its "flexible-extract", which takes the last number of the output:

    --tasks.0.extract '(-?[$0-9.,]{2,})|(-?[0-9]+)' --tasks.0.match last

The papers do not say which of the two they report. Items longer than the lengths below are left
out, and the results state their number (0 of the test split with GPT-2's tokenizer).
"""

from dials_jax import Confidence
from dials_jax.config import EvalConfig, EvalTask, TaskData


def get_config() -> EvalConfig:
    return EvalConfig(
        model="LLaDA-8B-Base",
        routers=("runs/gsm8k/router-1",),
        tasks=(
            EvalTask(
                name="gsm8k",
                metric="exact_match",
                data=TaskData(
                    paths=("data/gsm8k_test.jsonl",),
                    prompt="Question: {question}\nAnswer:",
                    answer=" {answer}",
                    prompt_length=512,
                    answer_length=512,
                    too_long="drop",
                ),
                sampler=Confidence(gen_length=256),
                extract=r"#### (-?[0-9.,]+)",
                match="first",
                until=("Question:", "</s>", "<|im_end|>"),
            ),
        ),
        similarity_threshold=0.95,
        batch_size=32,
    )
