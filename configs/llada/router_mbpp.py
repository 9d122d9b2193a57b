"""DIALS routers on LLaDA-8B for MBPP, with the settings of the paper.

python train.py --config configs/llada/router_mbpp.py --workdir runs/mbpp/router-1 \\
    --backbone LLaDA-8B-Base --objective.skip-weight 1.0

Data: MBPP as JSON lines, fields text, code, test_list (--data.paths also takes Parquet). Each row
is a task and its solution, without the examples of the evaluation. The paper does not give its
lambdas; train several.
"""

from dials_jax.config import ObjectiveConfig, OptimizerConfig, TrainConfig
from dials_jax.evaluation.benchmark_tasks import mbpp, training_data


def get_config() -> TrainConfig:
    return TrainConfig(
        backbone="LLaDA-8B-Base",
        data=training_data(
            mbpp(examples=""), "data/mbpp_train.jsonl", answer_length=256, prompt_length=512
        ),
        objective=ObjectiveConfig(skip_weight=1.0),
        # DIALS, section 4.1: 20 epochs; appendix A.1: 2 of warm-up.
        optimizer=OptimizerConfig(num_epochs=20.0, warmup_epochs=2.0),
        batch_size=64,
        num_microbatches=8,
        layout="unrolled",  # on less than 80 GB add --remat
    )
