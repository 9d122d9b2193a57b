"""The sandwich with 0 to 100 % of light steps, with models trained for minutes on local text.

python eval.py --config configs/mdlm/study_text_fractions.py \\
    --workdir runs/mdlm/study_text_fractions

Expected: docs/results/scheduling.md.
"""

from dials_jax.config import ScheduleStudy
from dials_jax.sampling.model_schedule import Schedule

STEPS = 240


def get_config() -> ScheduleStudy:
    sandwiches = [Schedule.sandwich(STEPS, percent / 100) for percent in range(0, 101, 10)]
    return ScheduleStudy(
        models=(("H", "runs/mdlm/text_12"), ("L", "runs/mdlm/text_4")),
        scorer="runs/mdlm/text_causal",
        schedules=tuple(map(str, sandwiches)),
        figure="fractions",
        steps=STEPS,
        num_samples=256,
        batch_size=64,
    )
