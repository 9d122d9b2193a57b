"""DIALS routers on LLaDA-8B for GSM8K, with the settings of the paper.

python train.py --config configs/llada/router_gsm8k.py --workdir runs/gsm8k/router-1 \\
    --backbone LLaDA-8B-Base --objective.skip-weight 1.0

The backbone is the published folder, or the folder that `python -m convert` made of it. The data is
GSM8K as JSONL with the fields "question" and "answer". On several devices: --mesh.fsdp 8. The paper
does not state its lambdas; train several.
"""

from dials_jax.config import ObjectiveConfig, OptimizerConfig, TrainConfig
from dials_jax.evaluation.benchmark_tasks import gsm8k, training_data


def get_config() -> TrainConfig:
    return TrainConfig(
        backbone="LLaDA-8B-Base",
        data=training_data(
            gsm8k(examples=""), "data/gsm8k_train.jsonl", answer_length=256, prompt_length=512
        ),
        objective=ObjectiveConfig(skip_weight=1.0),
        # DIALS, appendix A.1: 10 epochs, of which 2 of warm-up.
        optimizer=OptimizerConfig(num_epochs=10.0, warmup_epochs=2.0),
        batch_size=64,
        num_microbatches=8,
        layout="unrolled",  # on less than 80 GB add --remat
    )
