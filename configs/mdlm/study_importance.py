"""How far 4 to 10 blocks are from 12 at each noise level (Sedykh, figures 5 and 6).

python eval.py --config configs/mdlm/study_importance.py --workdir runs/mdlm/study_importance

Z is a second seed of the 12 blocks: its divergence is the baseline of figure 6. L is the light
model of the search. The text is the validation split that `prepare.py` wrote to data/openwebtext.

Published: the difference in loss and the relative KL both peak at t of 0.4 to 0.6 and are small at
the ends; models of fewer blocks differ more.
"""

from dials_jax.config import CorpusData, ImportanceStudy
from dials_jax.sampling.model_schedule import Schedule

STEPS = 1000
LIGHT = {"L": 4, "B": 6, "C": 8, "D": 10}  # letter: blocks


def get_config() -> ImportanceStudy:
    light = [(letter, f"runs/mdlm/blocks_{blocks}") for letter, blocks in LIGHT.items()]
    quarters = [Schedule.quarter(i, STEPS) for i in (1, 2, 3, 4)]
    schedules = [Schedule.sandwich(STEPS, 0.25), *quarters, f"L{STEPS}"]
    heavy = (("H", "runs/mdlm/blocks_12"), ("Z", "runs/mdlm/heavy_2"))
    return ImportanceStudy(
        models=(*heavy, *light),
        second_heavy="Z",
        schedules=tuple(map(str, schedules)),
        data=CorpusData(folder="data/openwebtext", split="validation"),
    )
