"""The hidden states of Dream-7B along its own trajectories (Goel, Figures 3 to 7 and 9 to 14).

python eval.py --config configs/representation/dream_7b.py --workdir runs/representation/dream_7b

The questions, lengths and steps of configs/representation/llada_8b.py, by Dream's sampler. What it
takes is said before anything is read: about 15 GB of weights, and less than 2 GB beside what
generating takes.
"""

from dials_jax.config import RepresentationStudy
from dials_jax.evaluation.benchmark_tasks import gsm8k


def get_config() -> RepresentationStudy:
    return RepresentationStudy(
        models=(("Dream", "Dream-v0-Base-7B"),),
        data=gsm8k("data/gsm8k_test.jsonl", examples="data/gsm8k_train.jsonl").data,
        num_prompts=64,
        window=256,
        gen_length=256,
        steps=64,
        batch_size=8,
    )
