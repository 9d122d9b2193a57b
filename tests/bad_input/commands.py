"""Entry points of the command line."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from types import SimpleNamespace

from hypothesis import strategies as st

from dials_jax.cli.main import COMMANDS, dials
from dials_jax.cli.options import Options
from tests.bad_input.run import EntryPoint, command
from tests.bad_input.values import Case, odd_texts

# Where no model, workdir or text is: what is given beside them cannot make the command right.
NOTHING = (
    "/none/such",
    "",
    "~nobody/x",
    "gs://bucket/x",
    "a" * 5000,
    "a\0b",
    "none/such",
    "/dev/null",
)
WRONG_OPTIONS = (
    ("--bogus", "1"), ("--seed", "four"), ("--seed", "-1"), ("--seed", ""), ("--optimizer.x", "1"),
    ("--batch-size", "1e3"), ("--data.num-items", "9" * 30), ("--no-seed",), ("stray",),
    ("--batch-size", "0"), ("--batch-size=",), ("--=", "1"), ("--.", "1"), ("--seed",),
    ("--tasks.99.limit", "1"), ("--tasks.0.sampler", "Nobody()"), ("--data", "x"), ("\udcff",),
)  # fmt: skip


def options_of(name: str) -> Options | None:
    """The parser of a command; None for those of configurations and of the harness."""
    module = import_module(f"dials_jax.{COMMANDS[name].module}")
    make = getattr(module, f"{name}_options", None)
    return make and make()


@st.composite
def wrong_line(draw, name: str, parser: Options):
    """Arguments of a command whose first place, a model, workdir or text, holds nothing."""
    arguments = []
    for action in draw(st.lists(st.sampled_from(parser._actions[1:]), max_size=3)):
        if action.option_strings:
            flag = draw(st.sampled_from(action.option_strings))
            takes_one = action.nargs != 0 and not isinstance(action, argparse.BooleanOptionalAction)
            arguments += [flag, draw(odd_texts)] if takes_one else [flag]
    place = draw(st.sampled_from(NOTHING))
    needed = {
        "tokenizer": ["train", "--vocab-size", "300", "--out", "/proc/none", "--text", place],
        "convert": [place, "/proc/none"],
        "export": [place, "--out", "/proc/none"],
    }
    first = needed.get(name, [place])
    arguments = [*arguments, *first] if draw(st.booleans()) else [*first, *arguments]
    odd = draw(st.lists(odd_texts, max_size=1))
    return Case([name, *arguments, *odd], "-h" not in arguments and "--help" not in arguments)


@st.composite
def wrong_configured(draw, world: SimpleNamespace):
    """Arguments of train, eval and prepare with at least one that is wrong."""
    name = draw(st.sampled_from(["train", "eval", "prepare"]))
    config = {
        "train": str(world.folder / "config.py"),
        "eval": "demo/sweep",
        "prepare": "mdlm/blocks_12",
    }
    where = draw(
        st.sampled_from(
            ["config", "option", "workdir"] if name != "prepare" else ["config", "option"]
        )
    )
    workdir = str(world.folder / "run")
    arguments = []
    if where == "config":
        others = ("demo/sweep", "demo/model") if name == "eval" else ("demo/sweep",)
        config[name] = draw(st.sampled_from([*NOTHING, "demo/modle", others[-1]]))
    elif where == "workdir":
        workdir = draw(
            st.sampled_from(
                ["", "~nobody/x", "gs://b/x", "a" * 5000, "a\0b", "/proc/x", "/dev/null/x"]
            )
        )
    else:
        arguments = list(draw(st.sampled_from(WRONG_OPTIONS)))
    place = [] if name == "prepare" else ["--workdir", workdir]
    return Case([name, "--config", config[name], *place, *arguments], True)


def run_line(arguments: list[str]) -> None:
    """Runs `dials`, and leaves `sys.argv` as it was."""
    before = sys.argv
    try:
        command(lambda: dials(arguments))
    finally:
        sys.argv = before


def command_entries(world: SimpleNamespace) -> list[EntryPoint]:
    parsers = {name: options_of(name) for name in COMMANDS}
    lines = [
        EntryPoint(f"dials {name}", wrong_line(name, parser), run_line, 0.5)
        for name, parser in parsers.items()
        if parser is not None
    ]
    names = odd_texts.filter(lambda x: x not in (*COMMANDS, "-h", "--help", "--version"))
    no_folders = st.sampled_from(["gs://b/x", "a" * 5000, "/dev/null/x"])
    return [
        *lines,
        EntryPoint("dials train, eval, prepare", wrong_configured(world), run_line, 0.5),
        EntryPoint("dials lm-eval", no_folders.map(
            lambda x: Case(["lm-eval", "--output_path", x], True)), run_line, 0.02),
        EntryPoint("dials", names.map(lambda x: Case([x], bool(x))), run_line, 0.3),
    ]  # fmt: skip
