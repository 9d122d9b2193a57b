"""LLaDA-8B with a dual cache, by lm-evaluation-harness: its own prompts, filters and scores.

python eval.py --config configs/llada/harness.py --workdir runs/harness \\
    --model.path LLaDA-8B-Base --model.router runs/gsm8k/router-1

Likelihoods from 128 masked copies, guided by 0.5 as in LLaDA's scripts for PIQA and ARC. 256 tokens
are generated in blocks of 32; with `--gen-kwargs max_gen_toks=512` that many. The tasks download
their data unless `include_path` names files that say where it is (docs/evaluation.md).
"""

from dials_jax import Confidence, DualCache
from dials_jax.config import HarnessConfig, HarnessModel


def get_config() -> HarnessConfig:
    return HarnessConfig(
        model=HarnessModel(
            path="LLaDA-8B-Base",
            sampler=Confidence(gen_length=256, block_length=32, stop_at_eos=True),
            cache=DualCache(),
            cfg_scale=0.5,
            batch_size=32,
        ),
        tasks=("gsm8k", "piqa", "arc_challenge"),
    )
