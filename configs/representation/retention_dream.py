"""Dream-7B under static layer skipping, k = 0 to 8 (Goel, Tables 1 and 3, Figure 1).

python eval.py --config configs/representation/retention_dream.py \\
    --workdir runs/retention/dream --model Dream-v0-Instruct-7B \\
    --tasks.1.allow-code-execution --tasks.2.allow-code-execution

As retention_llada.py, which says what is measured, with Dream's sampler: the least entropy first,
256 tokens in 256 steps, temperature 0. The paper's table has Dream-v0-Base-7B, too.
"""

from dials_jax.config import EvalConfig
from dials_jax.evaluation.benchmark_tasks import OUTPUT_LENGTH, goel_tasks
from dials_jax.sampling.dream import Dream


def get_config() -> EvalConfig:
    return EvalConfig(
        model="Dream-v0-Instruct-7B",
        tasks=goel_tasks(Dream(OUTPUT_LENGTH, top_p=0.95)),
        num_static=(1, 2, 3, 4, 5, 6, 7, 8),
        allow_adjacent=(False, True),
        num_random=(),
        kl_items=128,
        batch_size=32,
    )
