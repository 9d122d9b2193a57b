"""A conversation with a model in the terminal.

dials chat MODEL [--router R] [--system "Answer briefly."]

/reset begins a new conversation, /exit or Ctrl-D ends. The model needs a chat template.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any

from dials_jax.cli.options import Options, add_model_options, add_sampling_options
from dials_jax.commands import keep_programs
from dials_jax.errors import InputError

HELP = "/reset begins a new conversation, /exit or Ctrl-D ends"


def chat_command(argv: list[str] | None = None) -> None:
    """Loads the model and talks until the input ends."""
    given = chat_options().read(argv)
    keep_programs()
    from dials_jax.cli.open_model import open_model
    from dials_jax.text import generate_text

    model, settings = open_model(given, is_chat=True)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  input() then edits lines and remembers them
    print(HELP, file=sys.stderr)
    system = [{"role": "system", "content": given.system}] if given.system else []
    talk(lambda messages: generate_text(model, [messages], **settings)[0], system)


def talk(answer: Callable[[list[dict[str, str]]], Any], system: list[dict[str, str]]) -> None:
    """Reads lines and prints answers. A line that cannot be answered leaves the history as it was.

    Args:
      answer: to a conversation.
      system: what every conversation begins with.
    """
    history = list(system)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print(file=sys.stderr)
            return
        if line == "/exit":
            return
        if line == "/reset":
            history = list(system)
        elif line.startswith("/"):
            print(HELP, file=sys.stderr)
        elif line:
            asked = [*history, {"role": "user", "content": line}]
            try:
                found = answer(asked)
            except InputError as error:
                print(f"error: {error} (/reset begins a new conversation)", file=sys.stderr)
                continue
            print(found.text, flush=True)
            cost = f"{len(found.tokens)} tokens, {found.passes} passes, {found.layers_run:.1%}"
            print(f"({cost} of the layers, {found.seconds:.1f} s)", file=sys.stderr)
            history = [*asked, {"role": "assistant", "content": found.text}]


def chat_options() -> Options:
    parser = Options("chat", __doc__)
    add_model_options(parser)
    parser.add_argument("--system", default="", metavar="TEXT", help="the system message")
    add_sampling_options(parser)
    return parser
