"""The sandwich with light models of 4, 6, 8 and 10 blocks (Sedykh, table 1).

python eval.py --config configs/mdlm/study_sizes.py --workdir runs/mdlm/study_sizes

Published: 4 blocks 44.31 ± .76 (16.67 % of blocks saved), 6 blocks 43.67 ± .67 (12.5 %), 8 blocks
43.45 ± .73 (8.33 %), 10 blocks 42.90 ± .70 (4.17 %), all heavy 42.85 ± .71.
"""

from dials_jax.config import ScheduleStudy
from dials_jax.sampling.model_schedule import Schedule

STEPS = 1000
LIGHT = {"A": 4, "B": 6, "C": 8, "D": 10}  # letter: blocks


def get_config() -> ScheduleStudy:
    sandwiches = [Schedule.sandwich(STEPS, 0.25, light=letter) for letter in LIGHT]
    light = [(letter, f"runs/mdlm/blocks_{blocks}") for letter, blocks in LIGHT.items()]
    return ScheduleStudy(
        models=(("H", "runs/mdlm/blocks_12"), *light),
        scorer="checkpoints/gpt2-large",
        schedules=(f"H{STEPS}", *map(str, sandwiches)),
        steps=STEPS,
        precision="float32",
    )
