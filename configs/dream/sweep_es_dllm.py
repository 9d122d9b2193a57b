"""Dream-7B without a cache, with a dual cache and with ES-dLLM, by the settings of ES-dLLM.

python eval.py --config configs/dream/sweep_es_dllm.py --workdir runs/dream/es-dllm \\
    --model Dream-v0-Base-7B --tasks.0.allow-code-execution --tasks.1.allow-code-execution \\
    --tasks.2.allow-code-execution --tasks.3.allow-code-execution \\
    --tasks.4.allow-code-execution --tasks.5.allow-code-execution

Those of the base model. One token a step at temperature 0, the one of the most probable prediction,
in blocks of 64 (MATH: one block), and no end of text before its left neighbour is known. So does
ES-dLLM sample Dream: a warning says that Dream's own sampler is another. It asks questions of the
whole of MATH; here they are those of MATH-500. The sweep executes what the model writes, and asks
for permission for the tasks of HumanEval and MBPP: docs/evaluation.md, "Code".
"""

from dataclasses import replace

from dials_jax import Confidence, DualCache, EarlySkip
from dials_jax.config import EvalConfig
from dials_jax.evaluation.benchmark_tasks import gsm8k, humaneval, math500, mbpp

SETTINGS = (  # task, tokens, tokens per block, and after how many the canvas and the block refresh
    (humaneval("data/humaneval_test.jsonl"), 512, 64, 64, 2),
    (mbpp("data/mbpp_test.jsonl", examples="data/mbpp_examples.jsonl"), 512, 64, 256, 4),
    (gsm8k("data/gsm8k_test.jsonl", examples="data/gsm8k_train.jsonl"), 256, 64, 128, 4),
    (math500("data/math500_test.jsonl"), 256, 256, 256, 8),
)


def get_config() -> EvalConfig:
    tasks = []
    for task, length, block, prompt_every, block_every in SETTINGS:
        sampler = Confidence(length, block, delay_eos=True)
        early_skip = EarlySkip(prompt_every=prompt_every, block_every=block_every)
        for name, cache in (("no cache", None), ("dual", DualCache()), ("ES-dLLM", early_skip)):
            tasks.append(replace(task, name=f"{task.name} {name}", sampler=sampler, cache=cache))
    return EvalConfig(
        model="Dream-v0-Base-7B", tasks=tuple(tasks), num_static=(), num_random=(), batch_size=8
    )
