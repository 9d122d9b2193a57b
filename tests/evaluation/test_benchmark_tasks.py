"""The papers' benchmarks, from a few records in the layout in which each data set is published."""

import dataclasses
import json
import runpy
import string
from pathlib import Path

import numpy as np
import pytest

from dials_jax.config import EvalConfig
from dials_jax.data.questions import read_questions
from dials_jax.data.tasks import load_task_rows
from dials_jax.data.tokenizer import character_tokenizer
from dials_jax.evaluation.items import OUTPUT, load_items
from dials_jax.evaluation.run_code import PASSED, execute_programs
from dials_jax.evaluation.sweep import sweep
from dials_jax.models.folders import save_model
from dials_jax.sampling.confidence import Confidence
from tests.conftest import init_params, small_config

pytestmark = pytest.mark.usefixtures("without_plots")
CONFIGS = Path(__file__).parents[2] / "configs"
TOKENIZER = character_tokenizer(string.printable)
ADD = "def add(a, b):\n    return a + b"
TESTS = ["assert add(1, 2) == 3", "assert add(0, 0) == 0", "assert add(2, 2) == 4"]
MMLU = {"question": "1+1? ", "subject": "abstract_algebra", "choices": ["1", "2", "3", "4"]}
RECORDS = {
    "piqa": [
        {"goal": "Boil", "sol1": "Heat it", "sol2": "Cool it", "label": 0},
        {"goal": "Cut", "sol1": "A spoon", "sol2": "A saw", "label": 1},
    ],
    "arc_challenge": [
        {"question": "Sky?", "answerKey": "C",
         "choices": {"text": ["red", "old", "blue", "wet"], "label": ["A", "B", "C", "D"]}},
        {"question": "Gas?", "answerKey": "2",
         "choices": {"text": ["ice", "air", "sea"], "label": ["1", "2", "3"]}},
    ],
    "hellaswag": [
        {"activity_label": "Roof", "ctx_a": "A man sits.", "ctx_b": "he", "label": "3",
         "endings": ["falls.", "[step] sings.", "eats.", "works."]},
    ],
    "mmlu": [MMLU | {"answer": 1}, MMLU | {"question": "2+2?", "answer": 3}],
    "gsm8k": [{"question": "1+2?", "answer": "1+2=<<1+2=3>>3\n#### 3"}],
    "mbpp": [{"text": "Add.", "code": ADD, "task_id": 11, "test_list": TESTS}],
    "humaneval": [
        {"prompt": 'def add(a, b):\n    """Adds."""\n', "entry_point": "add",
         "canonical_solution": "    return a + b\n",
         "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n"},
    ],
    "math500": [{"problem": "$1+1$", "answer": "2"}],
}  # fmt: skip
EXAMPLES = {
    "mmlu": [MMLU | {"question": f"{n}-{n}?", "choices": list("0123"), "answer": 0}
             for n in range(5)],
    "gsm8k": [{"question": f"{n}+0?", "answer": f"#### {n}"} for n in range(5)],
    "mbpp": [{"text": f"Give {n}.", "code": f"def f(): return {n}",
              "test_list": [f"assert f() == {n}"] * 3} for n in range(3)],
}  # fmt: skip
# What lm-evaluation-harness 0.4.13 sends for the last of these records, and its right answer.
ARITHMETIC = "A. 0\nB. 1\nC. 2\nD. 3\nAnswer: A\n\n"
TEXTS = {
    "piqa": ("Question: Cut\nAnswer:", " A saw"),
    "arc_challenge": ("Question: Gas?\nAnswer:", " air"),
    "hellaswag": ("Roof: A man sits. He", " works."),
    "mmlu": (
        "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
        + "".join(f"{n}-{n}?\n{ARITHMETIC}" for n in range(5))
        + "2+2?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:",
        " D",
    ),
    "gsm8k": (
        "".join(f"Question: {n}+0?\nAnswer: #### {n}\n\n" for n in range(5))
        + "Question: 1+2?\nAnswer:",
        " 1+2=<<1+2=3>>3\n#### 3",
    ),
    "humaneval": (RECORDS["humaneval"][0]["prompt"], "    return a + b\n"),
    "math500": ("Problem: $1+1$\nAnswer:", " 2"),
}
EXPERT = "You are an expert Python programmer, and here is your task: "
CODE = ("mbpp", "humaneval")
TRAINED = [name for name in RECORDS if name not in ("humaneval", "math500")]
EPOCHS = {"piqa": 10, "hellaswag": 10, "gsm8k": 10, "mbpp": 20, "mmlu": 30, "arc_challenge": 40}


GENERATED = ("gsm8k", "mbpp", "humaneval", "math500")


def config(name, family="llada"):
    return runpy.run_path(str(CONFIGS / family / f"{name}.py"))["get_config"]()


@pytest.fixture(scope="module")
def folder(made_once):
    """The records of every data set, and a small random model that knows their characters."""

    def make(folder):
        for kind, tasks in (("test", RECORDS), ("examples", EXAMPLES)):
            for name, records in tasks.items():
                text = "".join(json.dumps(record) + "\n" for record in records)
                (folder / f"{name}_{kind}.jsonl").write_text(text)
        TOKENIZER.save(folder)
        ids = {f"{x}_id": TOKENIZER.token_to_id(f"[{x.upper()}]") for x in ("mask", "eos", "pad")}
        cfg = small_config(vocab_size=TOKENIZER.vocab_size, num_layers=2, max_length=2048, **ids)
        params = init_params(cfg)
        save_model(folder / "model", cfg, params, tokenizer_files=[folder / "tokenizer.json"])
        changes = {"model_type": "dream", "right_shift": True, "num_layers": 5}  # as ES-dLLM needs
        cfg = dataclasses.replace(cfg, **changes)
        params = init_params(cfg)
        save_model(folder / "dream", cfg, params, tokenizer_files=[folder / "tokenizer.json"])

    return made_once("benchmarks", make)


def local(folder, name, family="llada"):
    """The task of a configuration, on the records of `folder`."""
    (task,) = config(f"sweep_{name}", family).tasks
    return on_records(folder, name, task)


def on_records(folder, name, task):
    data = dataclasses.replace(task.data, paths=(str(folder / f"{name}_test.jsonl"),))
    if data.few_shot:
        examples = str(folder / f"{name}_examples.jsonl")
        data = dataclasses.replace(data, few_shot=(examples, data.few_shot[1]))
    return dataclasses.replace(task, data=data)


@pytest.mark.parametrize("name", TEXTS)
def test_prompts_and_answers_are_those_of_the_harness(folder, name):
    *_, (_, question) = read_questions(local(folder, name).data)
    assert (question.prompt, question.answers[question.label]) == TEXTS[name]


def test_prompts_of_mbpp_hold_three_solved_tasks(folder):
    ((_, question),) = read_questions(local(folder, "mbpp").data)
    first, *others = question.prompt.split(EXPERT)[1:]
    assert first == (
        "Give 0. Your code should pass these tests:\n\n"
        + "assert f() == 0\n" * 3
        + "[BEGIN]\ndef f(): return 0\n[DONE]\n\n"
    )
    assert len(others) == 3 and others[2].endswith("assert add(2, 2) == 4\n[BEGIN]\n")


@pytest.mark.parametrize("name", CODE)
def test_published_solutions_pass_and_others_fail(folder, name, model_config):
    (item,) = load_items(local(folder, name), TOKENIZER, model_config)
    solution = {"mbpp": ADD, "humaneval": "    return a + b\n"}[name]
    wrong = solution.replace("a + b", "a - b")
    programs = [item.program.replace(OUTPUT, text) for text in (solution, wrong, "")]
    verdicts = execute_programs(programs, 2)
    assert verdicts[0] == PASSED and PASSED not in verdicts[1:]


@pytest.fixture(scope="module")
def model_config(folder):
    return small_config(
        vocab_size=TOKENIZER.vocab_size, mask_id=TOKENIZER.token_to_id("[MASK]"), max_length=2048
    )


@pytest.mark.parametrize("name", TRAINED)
def test_routers_train_on_the_right_answers(folder, name, model_config):
    cfg = config(f"router_{name}")
    data = dataclasses.replace(cfg.data, paths=(str(folder / f"{name}_test.jsonl"),))
    rows = load_task_rows(data, model_config, TOKENIZER)
    tokens, answer, valid = rows.rows(range(rows.num_rows))
    assert rows.num_rows == len(RECORDS[name])
    for row, masked, real, record in zip(tokens, answer, valid, RECORDS[name], strict=True):
        text = TOKENIZER.decode(row[masked])
        assert text == " " * (name != "mbpp") + right_answer(name, record)
        if name not in ("gsm8k", "mbpp"):  # one end of text, and nothing behind it
            assert masked.sum() == len(TOKENIZER.encode(text)) + 1 and not real[-1]
    assert (cfg.optimizer.num_epochs, cfg.optimizer.warmup_epochs) == (EPOCHS[name], 2)
    assert np.prod(tokens.shape[1:]) <= 1024  # DIALS, appendix A.1


def right_answer(name, record):
    """By the published key, read without the library."""
    if name == "piqa":
        return record[("sol1", "sol2")[record["label"]]]
    if name == "arc_challenge":
        return dict(zip(*map(record["choices"].get, ("label", "text")), strict=True))[
            record["answerKey"]
        ]
    if name == "hellaswag":
        return record["endings"][int(record["label"])]
    if name == "mmlu":
        return "ABCD"[record["answer"]]
    return {"gsm8k": record.get("answer"), "mbpp": f"{record.get('code')}\n[DONE]"}[name]


def test_settings_are_those_of_table_3():
    tasks = {name: config(f"sweep_{name}").tasks[0] for name in RECORDS}
    samples = {
        name: tasks[name].num_samples for name in ("piqa", "arc_challenge", "hellaswag", "mmlu")
    }
    assert samples == {"piqa": 128, "arc_challenge": 128, "hellaswag": 128, "mmlu": 1}
    shots = {name: task.data.few_shot[1] for name, task in tasks.items() if task.data.few_shot}
    assert shots == {"mmlu": 5, "gsm8k": 5, "mbpp": 3}
    for name in ("gsm8k", *CODE, "math500"):
        sampler = tasks[name].sampler
        assert (sampler.gen_length, sampler.block_length, sampler.steps) == (256,) * 3
    assert not any(task.cfg_scale for task in tasks.values())
    assert not any(task.allow_code_execution for task in tasks.values())


def test_dream_generates_as_its_published_scripts_set_it():
    tasks = {name: config(f"sweep_{name}", "dream").tasks[0] for name in GENERATED}
    found = {n: (t.sampler.gen_length, t.sampler.temperature) for n, t in tasks.items()}
    assert found == {
        "gsm8k": (256, 0.0), "mbpp": (512, 0.2), "humaneval": (512, 0.2), "math500": (512, 0.0),
    }  # fmt: skip
    for name, task in tasks.items():
        sampler = task.sampler
        assert (sampler.alg, sampler.top_p, sampler.steps) == ("entropy", 0.95, sampler.gen_length)
        (other,) = config(f"sweep_{name}").tasks
        assert dataclasses.replace(other, sampler=sampler) == task and not task.allow_code_execution


def test_dream_runs_by_its_own_sampler_and_by_that_of_es_dllm(folder, tmp_path):
    tasks = []
    for task in [config(f"sweep_{name}", "dream").tasks[0] for name in GENERATED]:
        small = dataclasses.replace(task.sampler, max_new_tokens=4, steps=4)
        tasks.append(dataclasses.replace(task, sampler=small))
    for task in config("sweep_es_dllm", "dream").tasks:
        if task.name.startswith("gsm8k"):  # cheaper than all twelve
            small = dataclasses.replace(task.sampler, gen_length=8, block_length=8, steps=8)
            tasks.append(dataclasses.replace(task, sampler=small))
    for i, task in enumerate(tasks):
        name = task.name.partition(" ")[0]
        task = on_records(folder, name, dataclasses.replace(task, bucket=512, max_programs=1))
        run = {"allow_code_execution": True, "time_limit": 1} if name in CODE else {}
        compare = {} if name in CODE else {"compare": "text"}
        tasks[i] = dataclasses.replace(task, **run, **compare)
    cfg = EvalConfig(
        model=str(folder / "dream"), tasks=tuple(tasks), num_static=(), num_random=(), batch_size=1
    )
    with pytest.warns(UserWarning, match="this Dream model is sampled by LLaDA's rules"):
        runs = {run["task"]: run for run in sweep(cfg, tmp_path)["runs"]}
    assert runs.keys() == {task.name for task in tasks} and len(runs) == 7
    assert all(len(run["items"]) == 1 and run["num_dropped"] == 0 for run in runs.values())
    assert runs["gsm8k ES-dLLM"]["flops"]["model"] < runs["gsm8k dual"]["flops"]["model"]


def test_all_of_them_run(folder, tmp_path):
    tasks = []
    for name in RECORDS:
        small = {"bucket": 512, "max_programs": 1}
        task = dataclasses.replace(local(folder, name), **small)
        if task.generates:
            task = dataclasses.replace(task, sampler=Confidence(4, 4, 2), compare="text")
        if name in CODE:
            task = dataclasses.replace(task, allow_code_execution=True, time_limit=1)
        if task.metric == "choice":
            task = dataclasses.replace(task, num_samples=1)
        tasks.append(task)
    cfg = EvalConfig(
        model=str(folder / "model"), tasks=tuple(tasks), num_static=(), num_random=(), batch_size=4
    )
    runs = {run["task"]: run for run in sweep(cfg, tmp_path)["runs"]}
    assert {name: len(run["items"]) for name, run in runs.items()} == {
        name: len(records) for name, records in RECORDS.items()
    }
    assert all(run["num_dropped"] == 0 for run in runs.values())
    assert {"accuracy_per_token", "accuracy_per_character"} <= runs["hellaswag"]["also"].keys()
    assert runs["mmlu"]["also"]["mean_over_subject"] in (0, 0.5, 1)
    for name in CODE:
        assert runs[name]["examples"][0]["verdict"] != PASSED


# ---------------------------------------------------------- retention, as in Goel, Tables 1 to 3

GOEL = {  # the task that is run, and what makes a small model of the family
    "llada": ("gsm8k", {}),
    "dream": ("humaneval", {"right_shift": True}),
    "qwen2": ("math500", {"causal": True}),
}


@pytest.mark.parametrize("name", GOEL)
def test_the_configurations_of_retention_run(name, folder, tmp_path, without_plots):
    path = CONFIGS / "representation" / f"retention_{name}.py"
    cfg = runpy.run_path(str(path))["get_config"]()
    assert [task.name for task in cfg.tasks] == ["gsm8k", "humaneval", "mbpp", "math500"]
    assert cfg.num_static == tuple(range(1, 9)) and cfg.allow_adjacent == (False, True)
    (chosen, changes), ids = GOEL[name], ("mask", "eos", "pad")
    ids = {f"{x}_id": TOKENIZER.token_to_id(f"[{x.upper()}]") for x in ids}
    model = small_config(vocab_size=TOKENIZER.vocab_size, max_length=512, **ids, **changes)
    params, tokenizer = init_params(model), folder / "tokenizer.json"
    save_model(tmp_path / "model", model, params, tokenizer_files=[tokenizer])
    (task,) = (task for task in cfg.tasks if task.name == chosen)
    task = dataclasses.replace(
        task, data=local(folder, chosen).data, sampler=task.sampler.with_length(4), bucket=512,
        compare="text", allow_code_execution=chosen in CODE,
    )  # fmt: skip
    assert cfg.kl_items > 0  # measured in test_full_depth.py
    small = dataclasses.replace(
        cfg, model=str(tmp_path / "model"), tasks=(task,), num_static=(1, 2), batch_size=2,
        kl_items=0,
    )  # fmt: skip
    runs = sweep(small, tmp_path / "sweep")["runs"]
    assert [run["policy"]["label"] for run in runs] == [
        "full", "static k=1", "static k=1 adjacent", "static k=2", "static k=2 adjacent"
    ]  # fmt: skip
    for run in runs[1:]:
        assert run["generation"]["sampler"] == type(task.sampler).__name__.lower()
        assert run["flops"]["layers_run"] == 1 - run["policy"]["num_skipped"] / 4
        assert run["identical"].keys() == run["items"].keys()
