"""`dials COMMAND ...`: every command of the library.

dials train --config demo/model --workdir runs/model
dials eval --config demo/sweep --workdir runs/sweep
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

import dials_jax
from dials_jax.commands import run_as_process, run_command
from dials_jax.errors import nearest, require


class SubCommand(NamedTuple):
    """Where a command stands, and what it does in a line."""

    module: str
    function: str
    summary: str


COMMANDS = {
    "convert": SubCommand(
        "cli.convert", "convert_command", "a published checkpoint, to load faster"
    ),
    "copy": SubCommand("cli.copy", "copy_command", "files from a bucket, or to one"),
    "export": SubCommand("cli.export", "export_command", "a model, to the layout of its authors"),
    "tokenizer": SubCommand("cli.tokenizer", "tokenizer_command", "trained on text"),
    "prepare": SubCommand("cli.prepare", "prepare_command", "tokenise and pack a corpus, once"),
    "train": SubCommand("cli.train", "train_command", "a model, or routers on a frozen one"),
    "eval": SubCommand("cli.evaluate", "eval_command", "policies on tasks; studies"),
    "generate": SubCommand("cli.generate", "generate_command", "answers to prompts, as JSON lines"),
    "chat": SubCommand("cli.chat", "chat_command", "a conversation in the terminal"),
    "watch": SubCommand("cli.watch", "watch_command", "plays a generation again, call by call"),
    "bench": SubCommand("cli.bench", "bench_command", "times policies and caches, in turns"),
    "compare": SubCommand("cli.compare", "compare_command", "rows of sweeps, by a paired test"),
    "retention": SubCommand(
        "cli.retention", "retention_command", "score against skipped layers, of several models"
    ),
    "lm-eval": SubCommand(
        "cli.harness", "harness_command", "lm-evaluation-harness, with --model dials"
    ),
}


def dials(argv: Sequence[str] | None = None) -> None:
    """Runs the command that the first argument names; the rest is the command's own."""
    given = list(sys.argv[1:] if argv is None else argv)
    if not given or given[0] in ("-h", "--help"):
        print(help_text())
    elif given[0] == "--version":
        print(f"dials_jax {dials_jax.__version__}")
    else:
        run = run_as_process if argv is None else run_command
        run(lambda: start(*given))


def start(name: str, *arguments: str) -> None:
    """Raises: InputError for an unknown command, naming the nearest one."""
    known = f"dials has no command {name!r}{nearest(name, COMMANDS)}"
    require(name in COMMANDS, known)
    command = COMMANDS[name]
    sys.argv = [f"dials {name}", *arguments]  # what usage lines, and records of a run, show
    getattr(import_module(f"dials_jax.{command.module}"), command.function)()


def help_text() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: dials COMMAND ...\n",
            "Masked diffusion language models that leave out layers, tokens and steps.\n",
            *lines,
            "\n`dials COMMAND --help` lists its options; `dials --version`.",
        ]
    )


if __name__ == "__main__":
    dials()
