"""Chat templates: the published text that turns messages into a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dials_jax.data.tokenizer import Tokenizer
from dials_jax.errors import InputError, nearest, require, require_packages
from dials_jax.files import read_json

Message = dict[str, str]  # role ("system", "user", "assistant") and content
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")  # what templates may write


def read_chat_templates(folder: str | Path) -> dict[str, str]:
    """The templates of a tokenizer's folder by name, the usual one as "default"; {} without any.

    They are in chat_template.jinja, in chat_templates/NAME.jinja, or in tokenizer_config.json.
    """
    folder = Path(folder)
    found: dict[str, str] = {}
    if (folder / "tokenizer_config.json").is_file():
        stored = read_json(folder / "tokenizer_config.json").get("chat_template") or {}
        if isinstance(stored, str):
            stored = {"default": stored}
        if isinstance(stored, list):  # as older versions of transformers store several
            stored = {one["name"]: one["template"] for one in stored}
        found |= stored
    for file in (folder / "chat_templates").glob("*.jinja"):
        found[file.stem] = file.read_text(encoding="utf-8")
    if (folder / "chat_template.jinja").is_file():
        found["default"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    return found


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
    import jinja2
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
    except jinja2.exceptions.TemplateError as error:
        raise InputError(
            f"the chat template refuses these messages ({error}); leave out the system "
            "instruction, or the template"
        ) from error


def _text(token: Any) -> str:
    """A special token, which tokenizer_config.json may store with its settings."""
    return token["content"] if isinstance(token, dict) else token
