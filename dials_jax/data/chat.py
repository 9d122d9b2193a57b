"""Chat templates: the published text that turns messages into a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dials_jax.data.tokenizer import Tokenizer
from dials_jax.errors import InputError, nearest, require, require_packages
from dials_jax.files import CHAT_TEMPLATES, read_json

Message = dict[str, str]  # role ("system", "user", "assistant") and content
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")  # what templates may write


def read_chat_templates(folder: str | Path) -> dict[str, str]:
    """The templates of a tokenizer's folder by name, the usual one as "default"; {} without any.

    They are in chat_template.jinja, in chat_templates/NAME.jinja, or in tokenizer_config.json.

    Raises: InputError for a file that cannot be read, or that holds something else.
    """
    folder = Path(folder)
    file, default = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    found = _stored_templates(file) if file.is_file() else {}
    found |= {one.stem: _read_text(one) for one in (folder / CHAT_TEMPLATES).glob("*.jinja")}
    if default.is_file():
        found["default"] = _read_text(default)
    return found


def _stored_templates(file: Path) -> dict[str, str]:
    """Those of tokenizer_config.json."""
    stored = read_json(file).get("chat_template") or {}
    if isinstance(stored, str):
        stored = {"default": stored}
    if isinstance(stored, list):  # as older versions of transformers store several
        known = all(isinstance(x, dict) and {"name", "template"} <= x.keys() for x in stored)
        stored = {x["name"]: x["template"] for x in stored} if known else None
    known = isinstance(stored, dict) and all(isinstance(x, str) for x in stored.values())
    require(known, f"{file}: chat_template is neither a text nor a list of names and templates")
    return stored


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read as text ({error}); put it back") from error


def choose_template(templates: dict[str, str], name: str = "default") -> str:
    """Raises: InputError if there is none of this name."""
    require(bool(templates), "the tokenizer's folder has no chat template; leave out the option")
    require(name in templates, f"no chat template is called {name!r}{nearest(name, templates)}")
    return templates[name]


def render_chat(
    template: str,
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    folder: str | Path,
    add_generation_prompt: bool = True,
) -> str:
    """The prompt of a conversation, as `apply_chat_template` of transformers renders it.

    Args:
      folder: of the tokenizer; its tokenizer_config.json names the special tokens.
      add_generation_prompt: end with what opens the model's turn. Otherwise the last message is
        left open, so that the model continues it.

    Raises: InputError for messages that the template refuses.
    """
    require_packages("data", "transformers", "jinja2")
    from transformers import PreTrainedTokenizerFast

    file = Path(folder) / "tokenizer_config.json"
    config = read_json(file) if file.is_file() else {}
    special: dict[str, Any] = {name: _text(config[name]) for name in _NAMED if config.get(name)}
    renderer = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend, **special)
    try:
        return renderer.apply_chat_template(
            list(messages),
            chat_template=template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
    except Exception as error:  # a template is a program, and may raise anything
        reason = " ".join(str(error).split())
        raise InputError(
            f"the chat template refuses these messages ({reason}); leave out the system "
            "instruction, or the template"
        ) from error


def _text(token: Any) -> str:
    """A special token, which tokenizer_config.json may store with its settings."""
    return token["content"] if isinstance(token, dict) else token
