"""Trains a tokenizer on text: byte-level BPE, split into words as GPT-2 does.

Its folder is read by `load_tokenizer` and by AutoTokenizer of transformers:

    tokenizer.json           the whole tokenizer
    tokenizer_config.json    which of its tokens is [MASK], the end of text, padding
    chat_template.jinja      if it was made for conversations
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dials_jax.config import as_list, typed
from dials_jax.data.records import (
    JSON_LINES_SUFFIXES,
    TEXT_SUFFIXES,
    expand_paths,
    read_documents,
)
from dials_jax.data.tokenizer import Tokenizer, load_tokenizer
from dials_jax.errors import InputError, require, require_packages
from dials_jax.files import local_path, read_json, write_json
from dials_jax.stored import new_folder, require_new, writing

SPECIAL = {"pad": "[PAD]", "eos": "<|endoftext|>", "mask": "[MASK]"}  # their ids are 0, 1 and 2
CHAT_START, CHAT_END = "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
NUM_BYTES = 256  # each byte is a token, so that every text has ids
FEWEST_PAIRS = 2  # of tokens in the text that become one token


@typed
def train_tokenizer(
    paths: str | Path | Sequence[str | Path],
    vocab_size: int,
    folder: str | Path,
    *,
    chat: bool = False,
    text_field: str = "text",
) -> Tokenizer:
    """Trains a tokenizer on files and writes its folder, which must not exist.

    Equal text gives an equal tokenizer. The special tokens have the first ids.

    Args:
      paths: .txt and .jsonl (.gz, .xz) files, or folders of them; one, or several.
      vocab_size: number of ids, special tokens included; fewer if the text has no more pairs that
        occur twice.
      chat: adds the tokens and the template of conversations (ChatML).
      text_field: of JSON lines.

    Raises: InputError for files that cannot be read or hold no text, and a vocabulary too small.
    """
    require_packages("data", "tokenizers")
    special = [*SPECIAL.values(), *((CHAT_START, CHAT_END) if chat else ())]
    least = NUM_BYTES + len(special)
    require(
        vocab_size > least,
        f"vocab_size={vocab_size} is too small: bytes and special tokens take {least}; give more",
    )
    target = local_path(folder, "the tokenizer's folder")
    require_new(target)
    files = expand_paths(as_list(paths), TEXT_SUFFIXES + JSON_LINES_SUFFIXES)
    tokenizer = Tokenizer(_trained(files, vocab_size, special, text_field))
    again = "make room and run the command again"
    with new_folder(target, again) as unfinished, writing(unfinished, again):
        tokenizer.save(unfinished)
        ids = {name: tokenizer.token_to_id(token) for name, token in SPECIAL.items()}
        write_json(unfinished / "tokenizer_config.json", tokenizer_settings(tokenizer, **ids))
        if chat:
            (unfinished / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return tokenizer


def _trained(files: list[Path], vocab_size: int, special: list[str], field: str) -> Any:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=FEWEST_PAIRS,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    backend.train_from_iterator(_pieces(files, field), trainer)
    return backend


def _pieces(files: list[Path], field: str) -> Iterator[str]:
    """The text of all files, with progress. A long text may be cut inside a few words.

    Raises: InputError if there is none.
    """
    from tqdm import tqdm

    empty = True
    for file in tqdm(files, "reading", unit=" files", disable=None):
        for _, pieces in read_documents(file, field):
            for piece in pieces:
                empty = empty and not piece.strip()
                yield piece
    require(not empty, f"there is no text in {len(files)} files ({files[0]}, ...); name others")


def tokenizer_settings(tokenizer: Tokenizer, **ids: int | None) -> dict[str, Any]:
    """The content of tokenizer_config.json.

    Args:
      ids: of the special tokens: pad, eos, mask.
    """
    named = {name: tokenizer.id_to_token(i) for name, i in ids.items() if i is not None}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{f"{name}_token": token for name, token in named.items() if token is not None},
    }


@typed
def model_ids(folder: str | Path) -> dict[str, int]:
    """The size and special ids of a tokenizer's folder, by their names in `ModelConfig`.

    So `llada_small(12, 768, **model_ids("data/tokenizer"))` is a model for this tokenizer.

    Raises: InputError if tokenizer_config.json names no [MASK], end of text or padding.
    """
    folder = local_path(folder, "tokenizer")
    tokenizer, settings = load_tokenizer(folder), read_json(folder / "tokenizer_config.json")
    ids = {"vocab_size": tokenizer.vocab_size}
    for name in SPECIAL:
        token = settings.get(f"{name}_token")
        token = token["content"] if isinstance(token, dict) else token
        found = tokenizer.token_to_id(token) if isinstance(token, str) else None
        if found is None:
            raise InputError(f"{folder}/tokenizer_config.json names no {name}_token; add it")
        ids[f"{name}_id"] = found
    end = tokenizer.token_to_id(CHAT_END)
    return ids if end is None else ids | {"eot_id": end}
