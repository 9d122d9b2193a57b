"""Quarters and the sandwich with models trained for minutes on local text, scored by a causal one.

python eval.py --config configs/mdlm/study_text_schedules.py \\
    --workdir runs/mdlm/study_text_schedules

Expected: docs/results/scheduling.md.
"""

from dials_jax.config import ScheduleStudy
from dials_jax.sampling.model_schedule import Schedule

STEPS = 240


def get_config() -> ScheduleStudy:
    quarters = [Schedule.quarter(i, STEPS) for i in (1, 2, 3, 4)]
    schedules = [f"H{STEPS}", Schedule.sandwich(STEPS, 0.25), *quarters, f"L{STEPS}"]
    return ScheduleStudy(
        models=(("H", "runs/mdlm/text_12"), ("L", "runs/mdlm/text_4")),
        scorer="runs/mdlm/text_causal",
        schedules=tuple(map(str, schedules)),
        steps=STEPS,
        num_samples=512,
        batch_size=64,
    )
