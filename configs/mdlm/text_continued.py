"""A diffusion model on text that starts from the causal twin, as Dream did.

python train.py --config configs/mdlm/text_continued.py --workdir runs/mdlm/text_continued \\
    --data.paths data/text/train.jsonl.xz --data.tokenizer data/gpt2_bpe

Needs runs/mdlm/text_causal. Expected: a lower loss than text_12.py after equally many steps.
"""

from configs.mdlm.text_12 import text
from dials_jax.config import TrainConfig
from dials_jax.models.families import mdlm


def get_config() -> TrainConfig:
    return text(mdlm(12, right_shift=True), init_from="runs/mdlm/text_causal")
