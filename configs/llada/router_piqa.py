"""DIALS routers on LLaDA-8B for PIQA, with the settings of the paper.

python train.py --config configs/llada/router_piqa.py --workdir runs/piqa/router-1 \\
    --backbone LLaDA-8B-Base --objective.skip-weight 1.0

Data: PIQA as JSON lines, fields goal, sol1, sol2, label (--data.paths also takes Parquet). Each row
is a question and its right choice, spaced and tokenised as in the evaluation, and no end of text is
added but one. The paper does not give its lambdas; train several.
"""

from dials_jax.config import ObjectiveConfig, OptimizerConfig, TrainConfig
from dials_jax.evaluation.benchmark_tasks import piqa, training_data


def get_config() -> TrainConfig:
    return TrainConfig(
        backbone="LLaDA-8B-Base",
        data=training_data(piqa(), "data/piqa_train.jsonl", pad_answer=False),
        objective=ObjectiveConfig(skip_weight=1.0),
        # DIALS, section 4.1: 10 epochs; appendix A.1: 2 of warm-up.
        optimizer=OptimizerConfig(num_epochs=10.0, warmup_epochs=2.0),
        batch_size=64,
        num_microbatches=8,
        layout="unrolled",  # on less than 80 GB add --remat
    )
