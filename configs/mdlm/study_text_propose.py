"""How many trials find a good schedule, replayed on the search over local text.

python eval.py --config configs/mdlm/study_text_propose.py \\
    --workdir runs/mdlm/study_text_propose

Expected: docs/results/scheduling.md.
"""

from dials_jax.config import ProposeStudy


def get_config() -> ProposeStudy:
    return ProposeStudy(
        search="runs/mdlm/study_text_search",
        importance="runs/mdlm/study_text_importance",
        budgets=(1, 2, 4, 8, 16),
    )
