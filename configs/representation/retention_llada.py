"""LLaDA-8B under static layer skipping, k = 0 to 8 (Goel, Tables 1 and 2, Figure 1).

python eval.py --config configs/representation/retention_llada.py \\
    --workdir runs/retention/llada --model LLaDA-8B-Instruct \\
    --tasks.1.allow-code-execution --tasks.2.allow-code-execution

Layers are chosen by Goel, Algorithm 1 on 64 training prompts (of HumanEval and MATH-500, which name
none, on test prompts), once without neighbours and once with them. The paper's threshold of 0.95 is
left out, so that every k is reached: where all similarities are above it, the choices are equal.

The sweep has the score of every k, the share of outputs that are those of the full model, the KL to
it on 128 items, and the time. `dials retention` shows it beside the other two models:

    dials retention runs/retention/llada runs/retention/dream runs/retention/qwen2 \\
        --out runs/retention/report

256 tokens in 256 steps and one block at temperature 0; the paper names budgets of 16 and 32 steps:
--tasks.0.sampler.steps 32. HumanEval and MBPP execute what the model writes: docs/evaluation.md,
"Code". MATH-500 needs pip install 'dials_jax[math]'.
"""

from dials_jax.config import EvalConfig
from dials_jax.evaluation.benchmark_tasks import OUTPUT_LENGTH, goel_tasks
from dials_jax.sampling.confidence import Confidence


def get_config() -> EvalConfig:
    return EvalConfig(
        model="LLaDA-8B-Instruct",
        tasks=goel_tasks(Confidence(OUTPUT_LENGTH)),
        num_static=(1, 2, 3, 4, 5, 6, 7, 8),
        allow_adjacent=(False, True),
        num_random=(),
        kl_items=128,
        batch_size=32,
    )
