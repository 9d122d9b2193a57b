"""How many trials find a good schedule: importance and additive models, replayed on a search.

python eval.py --config configs/mdlm/study_propose.py --workdir runs/mdlm/study_propose

It needs the finished search and importance studies, and no accelerator. Expected: a rank
correlation of importance and perplexity near 0.9, and a small regret after ten trials (not
published; docs/scheduling_study.md explains the numbers).
"""

from dials_jax.config import ProposeStudy


def get_config() -> ProposeStudy:
    return ProposeStudy(search="runs/mdlm/study_search", importance="runs/mdlm/study_importance")
