"""The papers' benchmarks as tasks: prompts, spacing and scores of lm-evaluation-harness 0.4.13.

Numbers of examples, samples and tokens are those of DIALS, Table 3. Every function takes the files
with its questions: JSON lines, Parquet or folders of tensorflow-datasets, with the fields that the
data sets have where they are published. Configurations of routers take the same data for training,
without few-shot examples.
"""

from __future__ import annotations

from dataclasses import replace

from dials_jax.config import TaskData
from dials_jax.evaluation.task import EvalTask, SamplerConfig
from dials_jax.sampling.confidence import Confidence

OUTPUT_LENGTH = 256  # tokens, as many steps, one block (DIALS, Table 3)
QUESTION = "Question: {question}\nAnswer:"


def training_data(task: EvalTask, *paths: str, **changes) -> TaskData:
    """A task's data for training on other files, without few-shot examples."""
    return replace(task.data, paths=paths, few_shot=None, few_shot_by="", **changes)


def piqa(*paths: str) -> EvalTask:
    """PIQA, zero-shot. Fields: goal, sol1, sol2, label."""
    data = TaskData(
        paths=paths,
        prompt="Question: {goal}\nAnswer:",
        choices=("{sol1}", "{sol2}"),
        target_delimiter=" ",
        too_long="drop",
        **_lengths(256, 256),
    )
    return EvalTask(name="piqa", metric="choice", data=data)


def arc(*paths: str, name: str = "arc_challenge") -> EvalTask:
    """ARC-Challenge or ARC-Easy, zero-shot. Fields: question, choices, answerKey."""
    data = TaskData(
        paths=paths,
        prompt=QUESTION,
        choice_list="choices.text",
        label="answerKey",
        label_names="choices.label",
        target_delimiter=" ",
        too_long="drop",
        **_lengths(256, 128),
    )
    return EvalTask(name=name, metric="choice", data=data)


def hellaswag(*paths: str) -> EvalTask:
    """HellaSwag, zero-shot, by acc_norm. Fields: activity_label, ctx_a, ctx_b, endings, label."""
    data = TaskData(
        paths=paths,
        preparation="hellaswag",
        prompt="{query}",
        choice_list="endings",
        target_delimiter=" ",
        too_long="drop",
        **_lengths(256, 128),
    )
    return EvalTask(name="hellaswag", metric="choice", data=data, normalise="characters")


def mmlu(*paths: str, examples: str) -> EvalTask:
    """MMLU, 5-shot. Fields: question, subject, choices, answer. Args: examples: the dev split."""
    letters = ("A", "B", "C", "D")
    options = "\n".join(f"{letter}. {{choices.{i}}}" for i, letter in enumerate(letters))
    about = "The following are multiple choice questions (with answers) about {subject_words}.\n\n"
    data = TaskData(
        paths=paths,
        preparation="mmlu",
        prompt=f"{{question}}\n{options}\nAnswer:",
        choices=letters,
        label="answer",
        target_delimiter=" ",
        few_shot=(examples, 5),
        few_shot_by="subject",
        description=about,
        too_long="drop",
        **_lengths(3072, 8),
    )
    # An answer is one token: one masked copy gives its likelihood exactly.
    return EvalTask(name="mmlu", metric="choice", data=data, num_samples=1, mean_over="subject")


def gsm8k(*paths: str, examples: str) -> EvalTask:
    """GSM8K, 5-shot, "strict-match". Fields: question, answer. Args: examples: the training split.

    For "flexible-extract": extract=r"(-?[$0-9.,]{2,})|(-?[0-9]+)", match="last".
    """
    data = TaskData(
        paths=paths,
        prompt=QUESTION,
        answer="{answer}",
        target_delimiter=" ",
        few_shot=(examples, 5),
        too_long="drop",
        **_lengths(3072, 512),
    )
    return EvalTask(
        name="gsm8k",
        metric="exact_match",
        data=data,
        sampler=Confidence(OUTPUT_LENGTH),
        extract=r"#### (-?[0-9.,]+)",
        match="first",
        until=("Question:", "</s>", "<|im_end|>"),
    )


def mbpp(*paths: str, examples: str) -> EvalTask:
    """MBPP, 3-shot, pass@1. Fields: text, code, test_list. Args: examples: tasks 2, 3 and 4."""
    tests = "\n".join(f"{{test_list.{i}}}" for i in range(3))
    data = TaskData(
        paths=paths,
        prompt="You are an expert Python programmer, and here is your task: {text} Your code "
        f"should pass these tests:\n\n{tests}\n[BEGIN]\n",
        answer="{code}\n[DONE]",
        target_delimiter="",
        few_shot=(examples, 3),
        too_long="drop",
        **_lengths(3072, 512),
    )
    return EvalTask(
        name="mbpp",
        metric="code",
        data=data,
        sampler=Confidence(OUTPUT_LENGTH),
        until=("[DONE]",),
        program=f"{{output}}\n{tests}",
    )


def humaneval(*paths: str) -> EvalTask:
    """HumanEval, zero-shot, pass@1. Fields: prompt, canonical_solution, test, entry_point."""
    data = TaskData(
        paths=paths,
        prompt="{prompt}",
        answer="{canonical_solution}",
        target_delimiter="",
        too_long="drop",
        **_lengths(2048, 512),
    )
    return EvalTask(
        name="humaneval",
        metric="code",
        data=data,
        sampler=Confidence(OUTPUT_LENGTH),
        until=("\nclass", "\ndef", "\n#", "\nif", "\nprint"),
        program="{prompt}{output}\n{test}\ncheck({entry_point})",
    )


def math500(*paths: str) -> EvalTask:
    """MATH-500, zero-shot. Fields: problem, answer.

    The prompt is that of the harness's hendrycks_math500; answers are compared by value.
    """
    data = TaskData(
        paths=paths,
        prompt="Problem: {problem}\nAnswer:",
        answer="{answer}",
        target_delimiter=" ",
        too_long="drop",
        **_lengths(2048, 512),
    )
    return EvalTask(
        name="math500",
        metric="exact_match",
        data=data,
        sampler=Confidence(OUTPUT_LENGTH),
        until=("Problem:",),
        compare="math",
    )


def goel_tasks(sampler: SamplerConfig) -> tuple[EvalTask, ...]:
    """The benchmarks of Goel, section 4, on files of data/: GSM8K, HumanEval, MBPP, MATH-500.

    All models get the same prompts; how they generate is their own sampler's.
    """
    tasks = (
        gsm8k("data/gsm8k_test.jsonl", examples="data/gsm8k_train.jsonl"),
        humaneval("data/humaneval_test.jsonl"),
        mbpp("data/mbpp_test.jsonl", examples="data/mbpp_prompt.jsonl"),
        math500("data/math500_test.jsonl"),
    )
    return tuple(replace(task, sampler=sampler) for task in tasks)


def _lengths(prompt: int, answer: int) -> dict[str, int]:
    return {"prompt_length": prompt, "answer_length": answer}
