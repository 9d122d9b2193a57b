"""The text model under full, static, random and routed execution.

python eval.py --config configs/text/sweep.py --workdir runs/text/sweep \\
    --routers runs/text/router-0.1 runs/text/router-0.4 runs/text/router-1.5

Tasks: the NELBO of 384 tokens given 128, on validation text; and GSM8K's solutions given their
questions, by NELBO and by exact match of the final number. That number is the first one after
"####", before the model writes another question, as in lm-evaluation-harness's "strict-match". The
solutions have up to 303 tokens; 128 are generated.
"""

from dials_jax import Confidence
from dials_jax.config import EvalConfig, EvalTask, TaskData, TextData

GSM8K = TaskData(
    paths=("data/benchmarks/gsm8k_test.jsonl",),
    prompt="Question: {question}\nAnswer:",
    answer=" {answer}",
    prompt_length=256,
    answer_length=512,
    too_long="drop",
)


def get_config() -> EvalConfig:
    return EvalConfig(
        model="runs/text/model",
        routers=("runs/text/router",),
        tasks=(
            EvalTask(
                name="text",
                metric="nelbo",
                data=TextData(
                    paths=("data/text/validation.jsonl.xz",), length=512, prompt_length=128
                ),
                limit=512,
                num_samples=32,
            ),
            EvalTask(
                name="gsm8k_nelbo",
                metric="nelbo",
                data=GSM8K,
                limit=128,
                num_samples=32,
                bucket=256,
            ),
            EvalTask(
                name="gsm8k",
                metric="exact_match",
                data=GSM8K,
                sampler=Confidence(gen_length=128, steps=64),
                extract=r"#### (-?[0-9.,]+)",
                match="first",
                until=("Question:", "</s>", "<|im_end|>"),
                limit=128,
                bucket=256,
            ),
        ),
        num_static=(1, 2, 4),
        num_random=(1, 2, 4),
        batch_size=128,
    )
