"""Small published models with a tokenizer, and local files of tasks, for tests of the harness."""

import json
import shutil
from pathlib import Path

FOLDER = Path(__file__).parent / "harness"
GOLDEN = Path(__file__).parents[1] / "golden"
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(num_ids):
    """Byte-level BPE of the records' texts; [MASK] has the last id."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=num_ids - 1,
        special_tokens=["<|endoftext|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [file.read_text(encoding="utf-8") for file in sorted(FOLDER.glob("*.jsonl"))]
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens(["<|mask|>"])
    assert backend.token_to_id("<|mask|>") == num_ids - 1
    return backend


def make_model_folder(name, folder):
    """Copies a golden model, and writes a tokenizer that fits it."""
    shutil.copytree(
        GOLDEN / name, folder, ignore=shutil.ignore_patterns("*.npz"), dirs_exist_ok=True
    )
    num_ids = json.loads((folder / "config.json").read_text())["vocab_size"]
    make_tokenizer(num_ids).save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def write_task_files(folder, cache):
    """The harness's own gsm8k, piqa and arc_challenge on the local records.

    Args:
      cache: where `datasets` writes what it reads.
    """
    import lm_eval.tasks

    built_in = Path(lm_eval.tasks.__file__).parent
    tasks = {
        "gsm8k": ("gsm8k/gsm8k.yaml", {"train": "gsm8k_train", "test": "gsm8k_test"}),
        "piqa": ("piqa/piqa.yaml", {"validation": "piqa_validation"}),
        "arc_challenge": ("arc/arc_challenge.yaml", {"test": "arc_challenge_test"}),
    }
    for task, (file, splits) in tasks.items():
        files = {split: str(FOLDER / f"{name}.jsonl") for split, name in splits.items()}
        settings = {
            "include": str(built_in / file),
            "task": task,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": files, "cache_dir": str(cache)},
        }
        # The harness opens every split that a task names, also without few-shot examples.
        absent = {"train": "training_split", "validation": "validation_split"}
        settings |= {field: None for split, field in absent.items() if split not in splits}
        (folder / f"{task}.yaml").write_text(json.dumps(settings))  # JSON is YAML


def write_demo_tasks(folder):
    """The demo's items as tasks of the harness: a text to write, and a choice of two answers."""
    from dials_jax.config import ArithmeticData
    from dials_jax.data.arithmetic import ArithmeticTask

    records = ArithmeticTask(ArithmeticData()).test_records(8)
    lines = [r | {"choices": [r["answer"], r["answer"][:-1]]} for r in records]
    file = folder / "demo.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
        "target_delimiter": "",
    }
    text = {
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": []},
        "metric_list": [{"metric": "exact_match"}],
    }
    choice = {
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "{{0}}",
        "metric_list": [{"metric": "acc"}],
    }
    for name, settings in (("demo_text", text), ("demo_choice", choice)):
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name} | common | settings))
