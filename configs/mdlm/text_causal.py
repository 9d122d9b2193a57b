"""The causal twin of the 12-block MDLM on text: it scores the samples of the others.

python train.py --config configs/mdlm/text_causal.py --workdir runs/mdlm/text_causal \\
    --data.paths data/text/train.jsonl.xz --data.tokenizer data/gpt2_bpe

Settings as in text_12.py, but fewer steps: with more it overfits. Expected: 2.96 nats per token on
the validation text; 3.32 after 6,130 steps (--optimizer.num-steps 6130).
"""

from configs.mdlm.text_12 import text
from dials_jax.config import TrainConfig
from dials_jax.models.families import mdlm


def get_config() -> TrainConfig:
    return text(mdlm(12, causal=True), "causal", num_steps=2500)
