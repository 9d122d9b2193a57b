"""All 210 ways to make 4 of 10 segments light, 160 samples each (Sedykh, figures 2, 3, 4, 7).

python eval.py --config configs/mdlm/study_search.py --workdir runs/mdlm/study_search

It may be stopped and continued; every batch is kept. With --budget 20 and --importance
runs/mdlm/study_importance it tries only 20, each chosen by the trials before it.

Published: the best schedules are light at both ends, the worst in the middle; segments 3 to 6 have
positive influence (figure 7).
"""

from dials_jax.config import SearchStudy


def get_config() -> SearchStudy:
    return SearchStudy(
        models=(("H", "runs/mdlm/blocks_12"), ("L", "runs/mdlm/blocks_4")),
        scorer="checkpoints/gpt2-large",
        precision="float32",
    )
