"""iLLaDA-8B-Base by lm-evaluation-harness, with its authors' settings: blocks are appended.

python eval.py --config configs/illada/harness_base.py --workdir runs/illada/base \\
    --model.path iLLaDA-8B-Base

At most 1,024 tokens, in blocks of 32 that are appended one at a time, a token per step: the
authors' settings for GSM8K (8-shot chain of thought), MATH, BBH and MBPP. For HumanEval they take
512 tokens in one block, which is there from the start: --model.sampler 'Confidence(512)'. The tasks
download their data unless `include_path` names files that say where it is (docs/evaluation.md).
"""

from dials_jax import Confidence
from dials_jax.config import HarnessConfig, HarnessModel


def get_config() -> HarnessConfig:
    return HarnessConfig(
        model=HarnessModel(
            path="iLLaDA-8B-Base",
            sampler=Confidence(1024, 32, append_blocks=True, stop_at_eos=True),
            batch_size=16,
        ),
        tasks=("gsm8k_cot",),
        num_fewshot=8,
    )
