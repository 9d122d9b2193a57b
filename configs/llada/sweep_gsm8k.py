"""LLaDA-8B on GSM8K under full, static, random and routed execution.

python eval.py --config configs/llada/sweep_gsm8k.py --workdir runs/gsm8k/sweep \\
    --model LLaDA-8B-Base --routers runs/gsm8k/router-1

Generation as in DIALS, table 3: 256 tokens in 256 steps and one block. Zero-shot; put few-shot
examples into the prompts for the paper's five.
"""

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
                    answer_length=256,
                    too_long="drop",
                ),
                extract=r"#### (-?[\d,.]+)",
            ),
        ),
        similarity_threshold=0.95,
        batch_size=32,
    )
