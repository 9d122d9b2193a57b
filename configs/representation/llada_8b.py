"""The hidden states of LLaDA-8B along its own trajectories (Goel, Figures 3 to 7 and 9 to 14).

python eval.py --config configs/representation/llada_8b.py --workdir runs/representation/llada_8b

64 questions of GSM8K with their five examples, of which the model sees the last 256 tokens, then
256 tokens in 64 steps. Before anything is read, the command says how long it will take and how much
memory: on one GPU about 16 GB of weights, and at batch 8 less than 2 GB beside what generating
takes. `--batch-size`, `--change-layers` and `--mesh.fsdp 4` change that, and
`--models LLaDA LLaDA-8B-Instruct` names another folder. All three models in one report:

    --models LLaDA LLaDA-8B-Base Dream Dream-v0-Base-7B Qwen2.5 Qwen2.5-7B
"""

from dials_jax.config import RepresentationStudy
from dials_jax.evaluation.benchmark_tasks import gsm8k


def get_config() -> RepresentationStudy:
    return RepresentationStudy(
        models=(("LLaDA", "LLaDA-8B-Base"),),
        data=gsm8k("data/gsm8k_test.jsonl", examples="data/gsm8k_train.jsonl").data,
        num_prompts=64,
        window=256,
        gen_length=256,
        steps=64,
        batch_size=8,
    )
