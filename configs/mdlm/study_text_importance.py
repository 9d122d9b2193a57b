"""How far 4 blocks are from 12 at each noise level, at equal steps and at equal training time.

python eval.py --config configs/mdlm/study_text_importance.py \\
    --workdir runs/mdlm/study_text_importance

Expected: docs/results/scheduling.md.
"""

from dials_jax.config import ImportanceStudy, TextData
from dials_jax.sampling.model_schedule import Schedule

STEPS = 240


def get_config() -> ImportanceStudy:
    quarters = [Schedule.quarter(i, STEPS) for i in (1, 2, 3, 4)]
    schedules = [Schedule.sandwich(STEPS, 0.25), *quarters, f"L{STEPS}", f"M{STEPS}"]
    return ImportanceStudy(
        models=(
            ("H", "runs/mdlm/text_12"),
            ("Z", "runs/mdlm/text_heavy_2"),
            ("L", "runs/mdlm/text_4"),
            ("M", "runs/mdlm/text_4_long"),
        ),
        second_heavy="Z",
        data=TextData(
            paths=("data/text/validation.jsonl.xz",), tokenizer="data/gpt2_bpe", length=1024
        ),
        schedules=tuple(map(str, schedules)),
        num_sequences=256,
        batch_size=32,
    )
