"""The sandwich with 0 to 100 % of light steps: quality, FLOPs and wall-clock (Sedykh, table 2).

python eval.py --config configs/mdlm/study_fractions.py --workdir runs/mdlm/study_fractions

Published for 4 blocks: perplexity 42.9, 43.1, 43.8, 44.7, 45.9, 47.2, 48.6, 50.1, 51.4, 52.5, 53.4
at 0, 10, ... 100 %; at 100 % two thirds of the blocks (66.7 %) are saved, but only 28.3 % of
the time. Seconds are those of sampling, without compilation. --precision exact computes logits only
where tokens are revealed, so that time follows FLOPs.
"""

from dials_jax.config import ScheduleStudy
from dials_jax.sampling.model_schedule import Schedule

STEPS = 1000


def get_config() -> ScheduleStudy:
    sandwiches = [Schedule.sandwich(STEPS, percent / 100) for percent in range(0, 101, 10)]
    return ScheduleStudy(
        models=(("H", "runs/mdlm/blocks_12"), ("L", "runs/mdlm/blocks_4")),
        scorer="checkpoints/gpt2-large",
        schedules=tuple(map(str, sandwiches)),
        figure="fractions",
        steps=STEPS,
        precision="float32",
    )
