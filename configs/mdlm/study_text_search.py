"""All 28 ways to make 2 of 8 segments light, with models trained for minutes on local text.

python eval.py --config configs/mdlm/study_text_search.py \\
    --workdir runs/mdlm/study_text_search

Expected: docs/results/scheduling.md.
"""

from dials_jax.config import SearchStudy


def get_config() -> SearchStudy:
    return SearchStudy(
        models=(("H", "runs/mdlm/text_12"), ("L", "runs/mdlm/text_4")),
        scorer="runs/mdlm/text_causal",
        steps=240,
        num_segments=8,
        num_light=2,
        num_extremes=7,
        num_samples=128,
        batch_size=64,
    )
