"""A LLaDA of 124 M parameters on text, from scratch, on one GPU.

python train.py --config configs/text/model.py --workdir runs/text/model \\
    --data.paths data/text/train.jsonl.xz --data.tokenizer data/gpt2_bpe

Data: any .txt or .jsonl(.xz) files with a field "text", and GPT-2's vocab.json and merges.txt.
Expected: docs/results/routers_on_text.md.
"""

from dials_jax.config import OptimizerConfig, TextData, TrainConfig
from dials_jax.models.families import llada_small


def get_config() -> TrainConfig:
    return TrainConfig(
        # GPT-2's 50,257 tokens and [MASK], rounded up to a multiple of 128.
        model=llada_small(
            num_layers=12,
            d_model=640,
            vocab_size=50304,
            mask_id=50257,
            eos_id=50256,
            pad_id=50256,
            max_length=512,
        ),
        data=TextData(paths=("data/text/train.jsonl.xz",), tokenizer="data/gpt2_bpe", length=512),
        optimizer=OptimizerConfig(
            learning_rate=1e-3,
            weight_decay=0.1,
            final_scale=0.1,
            num_steps=3150,
            warmup_steps=200,
        ),
        batch_size=128,
        log_every=20,
        save_every=1000,
    )
