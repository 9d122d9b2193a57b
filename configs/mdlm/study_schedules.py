"""Where 250 of 1000 steps may be light: quarters and the sandwich (Sedykh, figure 1).

python eval.py --config configs/mdlm/study_schedules.py --workdir runs/mdlm/study_schedules

Figures 8 to 11 take another light model: --models H runs/mdlm/blocks_12 L runs/mdlm/blocks_6.
The scorer is GPT-2 large, converted (`python -m convert`). Precision float32 samples as the
published code does; --precision exact samples from the right distribution, which has higher
perplexity and entropy.

Published (1M training steps, 1,600 samples): all heavy 42.85 ± .71; the sandwich best at
44.31 ± .76, the first quarter close behind, the second and third quarters worst; all light 53.4.
"""

from dials_jax.config import ScheduleStudy
from dials_jax.sampling.model_schedule import Schedule

STEPS = 1000


def get_config() -> ScheduleStudy:
    quarters = [Schedule.quarter(i, STEPS) for i in (1, 2, 3, 4)]
    schedules = [f"H{STEPS}", Schedule.sandwich(STEPS, 0.25), *quarters, f"L{STEPS}"]
    return ScheduleStudy(
        models=(("H", "runs/mdlm/blocks_12"), ("L", "runs/mdlm/blocks_4")),
        scorer="checkpoints/gpt2-large",
        schedules=tuple(map(str, schedules)),
        steps=STEPS,
        precision="float32",
    )
