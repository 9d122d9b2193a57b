"""The hidden states of Qwen2.5-7B over its own answers (Goel, Figures 3 to 7 and 9 to 14).

python eval.py --config configs/representation/qwen2_5_7b.py \\
    --workdir runs/representation/qwen2_5_7b

The questions and lengths of configs/representation/llada_8b.py. The model decodes its answers, then
one forward pass over question and answer is measured: it shows what decoding saw. What it takes is
said before anything is read: about 15 GB of weights.
"""

from dials_jax.config import RepresentationStudy
from dials_jax.evaluation.benchmark_tasks import gsm8k


def get_config() -> RepresentationStudy:
    return RepresentationStudy(
        models=(("Qwen2.5", "Qwen2.5-7B"),),
        data=gsm8k("data/gsm8k_test.jsonl", examples="data/gsm8k_train.jsonl").data,
        num_prompts=64,
        window=256,
        gen_length=256,
        batch_size=8,
    )
