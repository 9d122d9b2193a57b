"""The command `dials`: its sub-commands, their help, and shipped configurations by name."""

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import dials_jax
import dials_jax as dj
from dials_jax import errors
from dials_jax.cli import main as cli
from dials_jax.cli.compare import compare_command
from dials_jax.cli.harness import harness_command
from dials_jax.commands import CommandLine
from dials_jax.config import ArithmeticData, CorpusData, EvalConfig, EvalTask, TrainConfig
from dials_jax.config_files import find_config, shipped_configs
from dials_jax.convert import lightning
from dials_jax.data.chat import render_chat
from dials_jax.data.documents import open_documents
from dials_jax.data.record_files import _read_parquet, _read_prepared, read_task_records
from dials_jax.data.tokenizer import character_tokenizer, load_tokenizer
from dials_jax.data.tokenizer_files import _read_published
from dials_jax.errors import InputError
from dials_jax.reporting import environment
from dials_jax.reporting.results import SweepResults
from dials_jax.reporting.skipping_plots import skipping_grid

ROOT = Path(__file__).parents[1]

HELP = """
import contextlib, sys
from dials_jax.cli.main import dials
for name in sys.argv[1:]:
    with contextlib.suppress(SystemExit):
        dials([*name.split(), "--help"])
print("slow", "jax" in sys.modules)
"""
SLOW = {"lm-eval"}  # its help is the harness's own


def test_help_is_there_before_jax_is():
    names = ["", *(name for name in cli.COMMANDS if name not in SLOW)]
    done = subprocess.run(
        [sys.executable, "-c", HELP, *names], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.endswith("slow False\n")
    for name in names[1:]:
        assert f"usage: dials {name}" in done.stdout


def test_every_command_stands_in_the_help_and_can_be_imported(capsys):
    cli.dials([])
    shown = capsys.readouterr().out
    for name, command in cli.COMMANDS.items():
        assert f"  {name} " in shown
        module = ROOT / "dials_jax" / (command.module.replace(".", "/") + ".py")
        defined = {x.name for x in ast.parse(module.read_text()).body if hasattr(x, "name")}
        assert command.function in defined


def test_the_version(capsys):
    cli.dials(["--version"])
    assert capsys.readouterr().out == f"dials_jax {dials_jax.__version__}\n"


def test_an_unknown_command_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.dials(["trian", "--config", "x"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: dials has no command 'trian'; did you mean 'train'?\n"


def test_a_command_is_recorded_as_it_was_given(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["dials eval", "--config", "a b"])
    assert environment.command() == "dials eval --config 'a b'"
    monkeypatch.setattr(sys, "argv", ["eval.py", "--config", "c"])
    assert environment.command() == "python eval.py --config c"


# ------------------------------------------------------------------------- configurations by name


@pytest.mark.parametrize("name", ["demo/model", "demo/model.py", "configs/demo/model.py"])
def test_a_shipped_configuration_is_found_by_name_anywhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = CommandLine.read("Trains.", ["--config", name, "--workdir", "run"])
    assert given.settings(TrainConfig).model.num_layers > 0
    assert find_config(name).samefile(ROOT / "configs" / "demo" / "model.py")


def test_a_file_comes_before_a_shipped_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "model").write_text("")
    assert find_config("demo/model") == tmp_path / "demo" / "model"


@pytest.mark.parametrize(
    ("name", "hint"),
    [("llada/sweep_gsm8", "; did you mean 'llada/sweep_gsm8k'?"), ("mine.py", "; --help lists")],
)
def test_a_name_that_is_missing(name, hint):
    with pytest.raises(InputError, match="is missing") as error:
        find_config(name)
    assert hint in str(error.value) and len(str(error.value)) < 200


def test_a_folder_is_no_configuration(tmp_path):
    with pytest.raises(InputError, match="is a folder; name a file in it"):
        find_config(str(tmp_path))


def test_all_configurations_are_shipped():
    files = (ROOT / "configs").rglob("*.py")
    assert shipped_configs().keys() == {
        path.relative_to(ROOT / "configs").with_suffix("").as_posix() for path in files
    }


# ------------------------------------------------------------------------------- public names


def test_public_names_are_those_that_type_checkers_see():
    tree = ast.parse((ROOT / "dials_jax/__init__.py").read_text())
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    homes = {alias.name: node.module for node in block.body for alias in node.names}
    assert homes == {name: f"dials_jax.{home}" for name, home in dials_jax._HOMES.items()}
    assert sorted(homes) == dials_jax.__all__
    for name in dials_jax.__all__:
        assert getattr(dials_jax, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'generat'"):
        dials_jax.generat  # noqa: B018


# ---------------------------------------------------------------------------------- where it goes

OUTPUTS = {
    "watch": ("nowhere --prompt 1 --out", "replay.html"),
    "generate": ("nowhere --prompt 1 --out", "answers.jsonl"),
    "export": ("nowhere --out", "model"),
    "convert": ("nowhere", "model"),
    "tokenizer": ("train --text nowhere --vocab-size 300 --out", "tokenizer"),
    "compare": ("nowhere --out", "comparison"),
    "retention": ("nowhere --out", "report"),
    "train": ("--config demo/router --backbone nowhere --workdir", "run"),
    "eval": ("--config demo/sweep --model nowhere --workdir", "run"),
    "eval study": ("--config mdlm/study_search --workdir", "run"),
    "prepare": ("--config mdlm/blocks_12 --data.tokenizer nowhere --data.folder", "corpus"),
}


@pytest.mark.parametrize("command", OUTPUTS)
def test_an_output_that_cannot_be_written_is_refused_before_anything_is_read(
    command, tmp_path, capsys, monkeypatch
):
    """The place is below a file; what would be read is missing, too."""
    monkeypatch.setattr(sys, "argv", [])  # commands set it
    (tmp_path / "file").touch()
    options, name = OUTPUTS[command]
    with pytest.raises(SystemExit) as stop:
        cli.dials([command.split()[0], *options.split(), str(tmp_path / "file" / name)])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ") and f"{tmp_path / 'file'} is no folder" in lines[-1]
    assert [line for line in lines if "error" in line] == lines[-1:]


@pytest.mark.parametrize("command", ["watch", "generate"])
def test_an_output_that_is_a_folder_is_refused_before_anything_is_read(command, tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.dials([command, "nowhere", "--prompt", "1", "--out", str(tmp_path)])
    assert f"--out={tmp_path} is a folder; name a file in it, as " in capsys.readouterr().err


# ------------------------------------------------------------------------------ optional packages

MATHS = EvalConfig(
    model="somewhere",
    tasks=(EvalTask(name="m", metric="exact_match", compare="math", data=ArithmeticData()),),
)


@pytest.mark.parametrize(
    ("package", "extra", "use"),
    [
        ("tokenizers", "data", lambda: character_tokenizer("abc")),
        ("tokenizers", "data", lambda: load_tokenizer("somewhere")),
        ("jinja2", "data", lambda: render_chat("", [], character_tokenizer("a"), "somewhere")),
        ("scipy", "eval", lambda: compare_command(["somewhere"])),
        ("lm_eval", "eval", harness_command),
        ("scipy", "eval", lambda: SweepResults({"runs": []}, "somewhere").rows),
        ("pandas", "eval", lambda: SweepResults({"runs": []}, "somewhere").to_dataframe()),
        ("matplotlib", "eval", lambda: skipping_grid(np.ones((2, 3), bool))),
        ("math_verify", "math", lambda: dj.sweep(MATHS, "somewhere")),
        ("transformers", "data", lambda: _read_published(Path("somewhere"))),
        ("datasets", "data", lambda: open_documents(CorpusData(dataset="x/y", folder="z"))),
        ("pyarrow", "data", lambda: next(_read_parquet(Path("x.parquet")))),
        ("importlib_resources", "data", lambda: next(_read_prepared(Path("x"), "train"))),
        ("torch", "torch", lambda: lightning._read_pickle(Path("x.ckpt"))),
    ],
)
def test_a_missing_package_is_one_line_with_its_extra(package, extra, use, monkeypatch):
    find = errors.find_spec
    monkeypatch.setattr(errors, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(InputError) as error:
        use()
    assert str(error.value).endswith(f"{package} missing; pip install 'dials_jax[{extra}]'")


@pytest.mark.parametrize(
    "read",
    [
        dj.load, dj.load_tokenizer, dj.load_results, find_config,
        lambda path: dj.load_router(path, None),
        lambda path: dj.train("demo/model", path),
        lambda path: next(read_task_records([path])),
    ],
)  # fmt: skip
def test_an_address_of_another_file_system_is_one_line(read, untyped):
    with pytest.raises(InputError, match=r"=gs://bucket/x is no local path, and only"):
        read("gs://bucket/x")
