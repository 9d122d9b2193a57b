"""The guides of docs/ are followed, in small; every command on a page is one that could start."""

import ast
import json
import re
import runpy
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from dials_jax.cli.main import COMMANDS, dials
from dials_jax.commands import CommandLine
from dials_jax.config import EvalConfig, HarnessConfig, TrainConfig
from dials_jax.studies.settings import AnyStudy

ROOT = Path(__file__).parents[1]
PAGES = {path.name: path for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
FENCE = re.compile(r"(<!-- needs: [^\n]*-->\n)?^```([^\n]*)\n(.*?)^```", re.M | re.S)
# Pages whose Python is run: by test_docs.py, by a test below, or by one of their area.
RUN = {
    "README.md", "caching.md", "data.md", "eight_bits.md", "evaluation.md", "export.md",
    "generate.md", "install.md", "own_code.md", "own_task.md", "python.md", "quickstart.md",
    "reports.md",
    "representation.md", "sampling.md", "scheduling.md", "scheduling_study.md", "skipping.md",
    "training.md",
}  # fmt: skip
SETTINGS = {
    "train": TrainConfig, "prepare": TrainConfig, "eval": EvalConfig | HarnessConfig | AnyStudy,
}  # fmt: skip


def blocks(page):
    """(what it needs, language and title, text) of every block of a page."""
    return FENCE.findall(PAGES[page].read_text(encoding="utf-8"))


def commands(page, everything=True):
    """The command lines of the blocks without a language, or of those that need nothing."""
    for needs, language, text in blocks(page):
        if language or (needs and not everything):
            continue
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                end = words.index(">") if ">" in words else len(words)
                yield [word for word in words[:end] if word != "..."]


def follow(page, in_small, changes=()):
    """Runs a guide: writes its files, runs its programs and commands.

    `in_small` has more options of the commands that run, the others are read; `changes` replaces
    texts of the page's files.
    """
    for _, language, text in blocks(page):
        if title := re.search(r'title="([^"]+)"', language):
            for old, new in changes:
                text = text.replace(old, new)
            Path(title[1]).write_text(text, encoding="utf-8")
    for first, *words in commands(page, everything=False):
        if first == "python":
            runpy.run_path(words[0])
        elif first == "dials" and in_small.get(words[0]) is None:
            check_command(words[0], words[1:])
        elif first == "dials":
            dials([*words, *in_small[words[0]]])


@pytest.mark.parametrize("page", PAGES)
def test_no_python_of_a_page_is_left_unrun(page):
    kinds = [(needs, language) for needs, language, _ in blocks(page)]
    assert page in RUN or not any(k.startswith("python") and not needs for needs, k in kinds)


@pytest.mark.parametrize("page", [page for page in PAGES if list(commands(page))])
def test_commands_of_a_page_could_start(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for first, *words in commands(page):
        if first == "python" and words[0] == "-m":
            module = words[1].replace(".", "/")
            assert (ROOT / f"{module}.py").is_file() or (ROOT / module).is_dir(), words
        elif first == "python" and words[0].removesuffix(".py") in ("train", "eval", "prepare"):
            check_command(words[0].removesuffix(".py"), words[1:])
        elif first.rpartition("/")[2] == "dials" and words[0] in COMMANDS:
            check_command(words[0], words[1:])


def check_command(name, words):
    """Reads the options of a command, as it would before it starts."""
    if "--help" in words:
        return
    if name in SETTINGS and "--config" in words:
        given = CommandLine.read("", words, needs_workdir=name != "prepare")
        if "/" in given.config or Path(given.config).is_file():  # the others stand for any
            assert isinstance(given.settings(SETTINGS[name]), SETTINGS[name])
    elif name not in SETTINGS:
        check_options(name, words)


def check_options(name, words):
    """Of commands with a parser of their own, `NAME_options()`."""
    module = import_module(f"dials_jax.{COMMANDS[name].module}")
    for function in [f for key, f in vars(module).items() if key == f"{name}_options"]:
        function().read(words)


def test_the_guide_to_an_own_task(tmp_path, monkeypatch, capsys, draw_only):
    draw_only("tradeoff")
    monkeypatch.chdir(tmp_path)
    steps = ["--optimizer.num-steps", "2", "--optimizer.warmup-steps", "1", "--batch-size", "4"]
    few = ["--tasks.0.limit", "4", "--num-static", "1", "--num-random", "--batch-size", "4"]
    small = {"tokenizer": (), "train": steps, "eval": few}  # tests of text generate and bench
    changes = [("20_000", "600"), ("num_layers=6", "num_layers=2"), ("d_model=96", "d_model=32")]
    follow("own_task.md", small, changes)
    shown = next(text for _, kind, text in blocks("own_task.md") if kind == "json")
    assert (
        json.loads(shown).keys()
        == json.loads(Path("dates_test.jsonl").read_text().partition("\n")[0]).keys()
    )
    results = json.loads(Path("runs/sweep/results.json").read_text())
    assert len(results["runs"]) == 4  # full, static, two routers
    assert "runs/sweep" in capsys.readouterr().out


def test_the_guides_to_training_and_to_schedules(tmp_path, monkeypatch):
    """The second goes on in the first one's folder; its studies are tested where they are."""
    monkeypatch.chdir(tmp_path)
    steps = ["--optimizer.num-steps", "2", "--optimizer.warmup-steps", "1"]
    small = {"tokenizer": (), "train": steps, "generate": ()}
    follow("training.md", small, [("topics.items()", "sorted(topics.items())[:9]")])
    assert Path("runs/small/model/config.json").is_file()
    follow("scheduling_study.md", {})
    assert runpy.run_path("small.py")["get_config"]().model.mask_id == 2


# ------------------------------------------------------------------------ the page of errors


def templates():
    """Texts of the code; `...` stands where a value is put in. Of a call, all its texts joined."""

    def text(node):
        if isinstance(node, ast.JoinedStr):
            return "".join(x.value if isinstance(x, ast.Constant) else "..." for x in node.values)
        return node.value

    for path in (ROOT / "dials_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr) or (
                isinstance(node, ast.Constant) and isinstance(node.value, str)
            ):
                yield text(node)


def test_quoted_errors_are_those_of_the_code():
    quoted = re.findall(r"^> `(.*)`$", PAGES["errors.md"].read_text(encoding="utf-8"), re.M)
    found = set(templates())
    assert len(quoted) > 20
    for message in quoted:
        start = message.removesuffix("...")
        assert any(start in text for text in found), f"no error says: {message}"


def test_the_notebook(tmp_path, monkeypatch, draw_only):
    """Its cells run in small. It is stored without outputs."""
    draw_only("tradeoff")
    monkeypatch.chdir(tmp_path)
    cells = json.loads((ROOT / "examples/first_steps.ipynb").read_text())["cells"]
    codes = [cell for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in codes)
    small = {
        "1000, 300, 200": "10, 5, 4",
        "steps = {": 'steps = {"model.num_layers": 2, "batch_size": 4, ',
        '"num_random": (1,)': '"num_random": ()',
    }
    names = {}
    for cell in codes:
        source = "".join(cell["source"])
        for old, new in small.items():
            source = source.replace(old, new)
        exec(source, names)
    assert len(names["results"].rows) == 3
