"""LLaDA-1.5 by lm-evaluation-harness, with its authors' settings: chat template, a token per step.

python eval.py --config configs/llada/harness_1_5.py --workdir runs/llada-1.5/gsm8k \\
    --model.path LLaDA-1.5

The settings are those of GSM8K and IFEval: 256 tokens in blocks of 16, end of text and of turn are
committed last. The others, as --model.sampler '...':

MATH              Confidence(1024, 128, confidence_eos_eot_inf=True)
HumanEval, MBPP   Confidence(512, 32, confidence_eos_eot_inf=True)
GPQA              Confidence(256, 16)

The authors evaluate with OpenCompass, whose prompts are others; scores need not be equal.
"""

from dials_jax import Confidence
from dials_jax.config import HarnessConfig, HarnessModel


def get_config() -> HarnessConfig:
    return HarnessConfig(
        model=HarnessModel(
            path="LLaDA-1.5",
            sampler=Confidence(256, 16, confidence_eos_eot_inf=True),
            batch_size=32,
        ),
        tasks=("gsm8k",),
        apply_chat_template=True,
    )
