"""Qwen2.5-7B under static layer skipping, k = 0 to 8 (Goel, Table 1, Figure 1): a causal model.

python eval.py --config configs/representation/retention_qwen2.py \\
    --workdir runs/retention/qwen2 --model Qwen2.5-7B \\
    --tasks.1.allow-code-execution --tasks.2.allow-code-execution

As retention_llada.py, which says what is measured, with the most probable token after the other, at
most 256. Layers are compared on the prompts in the model's own forward pass.
"""

from dials_jax.config import EvalConfig
from dials_jax.evaluation.benchmark_tasks import OUTPUT_LENGTH, goel_tasks
from dials_jax.sampling.autoregressive import Autoregressive


def get_config() -> EvalConfig:
    return EvalConfig(
        model="Qwen2.5-7B",
        tasks=goel_tasks(Autoregressive(OUTPUT_LENGTH)),
        num_static=(1, 2, 3, 4, 5, 6, 7, 8),
        allow_adjacent=(False, True),
        num_random=(),
        kl_items=128,
        batch_size=32,
    )
