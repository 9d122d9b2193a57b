"""Whatever the user gets wrong ends a command with status 2 and one line that says what to do."""

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from dials_jax.config import RouterConfig
from dials_jax.data.tokenizer import character_tokenizer
from dials_jax.loading import load
from dials_jax.skipping.storage import save_router
from dials_jax.training.loop import train
from tests.conftest import jitted_init_routers

ROOT = Path(__file__).parents[1]

TRAIN = """
from dials_jax.config import *
from dials_jax.models.families import llada_small

def get_config():
    return TrainConfig(
        model=llada_small(num_layers=2, d_model=32, vocab_size=19, mask_id=18, eos_id=1, pad_id=0,
                    max_length=32, dtype="float32"),
        data={data},
        optimizer=OptimizerConfig(learning_rate=1e-2, num_steps=4, warmup_steps=1{more}),
        batch_size=8,
    )
"""

EVAL = """
from dials_jax.config import *

def get_config():
    data = TaskData(paths=({paths!r},), prompt_length=8, answer_length=4)
    task = EvalTask(name="sums", metric="exact_match", data=data)
    return EvalConfig(model={model!r}, tasks=(task,), num_static=(), num_random=())
"""

RECORD = {"prompt": "+12,34=", "answer": "46"}
ARITHMETIC = "ArithmeticData(num_items=100)"


@pytest.fixture
def error_of(monkeypatch, capsys, tmp_path):
    """Runs a command and returns the one line that it leaves."""

    def run(script, config, *options, workdir="run"):
        argv = ["--config", str(config), "--workdir", str(tmp_path / workdir), *options]
        monkeypatch.setattr(sys, "argv", [script, *argv])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        assert stop.value.code == 2
        errors = capsys.readouterr().err.splitlines()
        lines = [line for line in errors if line.startswith("error: ")]
        assert len(lines) == 1 and errors[-1] == lines[0]
        assert not any("Traceback" in line or "╭" in line for line in errors)
        return lines[0]

    return run


@pytest.fixture
def train_file(tmp_path):
    def write(data=ARITHMETIC, more=""):
        (tmp_path / "train_config.py").write_text(TRAIN.format(data=data, more=more))
        return tmp_path / "train_config.py"

    return write


@pytest.fixture
def eval_file(tmp_path, arithmetic_model):
    def write(*lines, model=arithmetic_model):
        records = tmp_path / "test.jsonl"
        records.write_text("".join(line + "\n" for line in lines))
        config = EVAL.format(paths=str(records), model=str(model))
        (tmp_path / "eval_config.py").write_text(config)
        return tmp_path / "eval_config.py"

    return write


@pytest.fixture
def task_data(tmp_path):
    """The text of a TaskData of these lines, with a character tokenizer of these characters."""

    def make(*lines, characters="0123456789,=+r>s"):
        character_tokenizer(characters).save(tmp_path)
        (tmp_path / "train.jsonl").write_text("".join(line + "\n" for line in lines))
        paths, tokenizer = str(tmp_path / "train.jsonl"), str(tmp_path)
        return (
            f"TaskData(paths=({paths!r},), tokenizer={tokenizer!r}, "
            "prompt_length=8, answer_length=4)"
        )

    return make


# --------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--bach-size", "4"), "--batch-size"),
        (("--optimizer.learning-rat", "1"), "--optimizer.learning-rate"),
        (("--batch-size", "four"), "--batch-size"),
        (("--batch-size", "7", "--num-microbatches", "2"), "batch_size=7 must be divisible"),
        (("--mesh.data", "3"), "mesh data=3"),
        (("--optimizer.warmup-steps", "9"), "a warm-up of 9 steps"),
    ],
)
def test_options_that_do_not_fit(options, message, train_file, error_of):
    assert message in error_of("train.py", train_file(), *options)


def test_an_unknown_field_in_a_file_names_the_nearest(train_file, tmp_path):
    """In a process of its own: the shape checks of the tests would refuse the field first."""
    config = train_file(more=", wheight_decay=0.1")
    command = [sys.executable, "train.py", "--config", config, "--workdir", tmp_path / "run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert line.endswith("'wheight_decay'; did you mean 'weight_decay'?")


def test_a_configuration_that_is_missing_or_of_the_other_command(train_file, error_of, tmp_path):
    assert "missing" in error_of("train.py", tmp_path / "no.py")
    assert "use the other command" in error_of("eval.py", train_file())


# --------------------------------------------------------------------------------------- data


def test_a_line_that_does_not_parse_is_named(train_file, eval_file, task_data, error_of):
    lines = json.dumps(RECORD), '{"prompt": '
    assert "train.jsonl:2: " in error_of("train.py", train_file(task_data(*lines)))
    assert "test.jsonl:2: " in error_of("eval.py", eval_file(*lines))


def test_an_empty_data_set(train_file, eval_file, task_data, error_of):
    assert "no prompt/answer pair" in error_of("train.py", train_file(task_data()))
    assert "task 'sums' has no items" in error_of("eval.py", eval_file())


def test_a_prompt_with_the_mask(train_file, eval_file, task_data, error_of):
    lines = json.dumps(RECORD), json.dumps(RECORD | {"prompt": "+12[MASK]="})
    for error in (
        error_of("train.py", train_file(task_data(*lines))),
        error_of("eval.py", eval_file(*lines)),
    ):
        assert ".jsonl:2: the prompt contains [MASK]" in error


def test_a_tokenizer_without_the_mask(train_file, task_data, error_of):
    data = task_data(json.dumps(RECORD), characters="0123456789,=+")
    assert "has no token mask_id=18" in error_of("train.py", train_file(data))


# --------------------------------------------------------------------------- models and workdirs


def test_a_model_that_is_not_there(train_file, eval_file, error_of, tmp_path):
    missing = eval_file(json.dumps(RECORD), model=tmp_path / "none")
    assert "is not a folder" in error_of("eval.py", missing)
    (tmp_path / "empty").mkdir()
    empty = eval_file(json.dumps(RECORD), model=tmp_path / "empty")
    assert "holds no model" in error_of("eval.py", empty)


def test_the_workdir_of_another_experiment(train_file, train_config, error_of, tmp_path):
    train(train_config(), tmp_path / "run")
    error = error_of("train.py", train_file(), "--seed", "3")
    assert "holds another experiment" in error and "choose another --workdir" in error


def test_the_router_of_another_backbone(eval_file, other_model, error_of, tmp_path):
    other, cfg = load(other_model), RouterConfig(d_hidden=8)
    routers = jitted_init_routers(other.config.d_model, other.num_layers, cfg, jax.random.key(0))
    save_router(tmp_path / "trained" / "router", routers, cfg, other, skip_weight=1.0)
    config = eval_file(json.dumps(RECORD))
    error = error_of("eval.py", config, "--routers", str(tmp_path / "trained"))
    assert "belongs to another backbone" in error
    shutil.rmtree(tmp_path / "trained" / "router")
    error = error_of("eval.py", config, "--routers", str(tmp_path / "trained"))
    assert "holds no router" in error


def test_results_that_cannot_be_written_are_refused_first(
    train_file, eval_file, error_of, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("")
    message = "file is no folder that can be written to; choose another --workdir"
    assert message in error_of("train.py", train_file(), workdir="file/run")
    assert message in error_of("eval.py", eval_file(json.dumps(RECORD)), workdir="file")


@pytest.mark.parametrize("package", ["matplotlib", "scipy"])
def test_packages_that_only_the_end_needs_are_asked_for_first(
    package, eval_file, error_of, monkeypatch
):
    monkeypatch.setitem(sys.modules, package, None)
    error = error_of("eval.py", eval_file(json.dumps(RECORD)))
    assert f"{package} missing; pip install 'dials_jax[eval]'" in error


def test_numbers_of_items_and_rows_are_positive(eval_file, error_of):
    config = eval_file(json.dumps(RECORD))
    assert "batch_size=0 must be positive" in error_of("eval.py", config, "--batch-size", "0")
    assert "limit=-1 must be positive" in error_of("eval.py", config, "--tasks.0.limit", "-1")


def test_training_that_diverges(train_file, error_of, tmp_path):
    error = error_of("train.py", train_file(), "--optimizer.learning-rate", "1e37")
    assert "not finite at step 2" in error
    assert not (tmp_path / "run" / "model").exists()
