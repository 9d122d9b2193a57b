"""Tokenizers: a thin wrapper of `tokenizers.Tokenizer` with the options that this library needs."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from dials_jax.config import ModelConfig, typed
from dials_jax.data.spelling import SpellingChecker, make_spelling_checker, spelling_error
from dials_jax.data.tokenizer_files import (
    backend_fingerprint,
    read_tokenizer_file,
    read_tokenizer_folder,
)
from dials_jax.errors import InputError, require, require_packages
from dials_jax.files import local_path

Ids = Sequence[int] | Int[np.ndarray, "_"]


class Tokenizer:
    """A `tokenizers.Tokenizer` that adds no special tokens, does not pad and does not truncate.

    Args:
      backend: a `tokenizers.Tokenizer`.
      earlier: fingerprints under which version 0.1 knew the same ids.
      misread: fingerprint of the tokenizer that version 0.1 read instead, if its ids were wrong.
    """

    def __init__(self, backend: Any, earlier: Sequence[str] = (), misread: str | None = None):
        # A tokenizer.json may set both, and truncation would silently lose text.
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.misread = misread
        self._earlier = tuple(earlier)

    def __repr__(self) -> str:
        added = self.backend.get_added_tokens_decoder().values()
        special = [token.content for token in added if token.special]
        names = ", ".join(special[:4]) + (", ..." if len(special) > 4 else "")
        return f"Tokenizer({self.vocab_size:,} ids, special: {names or 'none'})"

    def encode(self, text: str) -> list[int]:
        """Returns the ids of one text; errors as in `encode_batch`."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Returns the ids of each text.

        Raises: InputError for a character that the vocabulary cannot encode.
        """
        self.check_spelling(texts)
        try:
            encodings = self.backend.encode_batch(texts, add_special_tokens=False)
        except Exception as error:  # the package raises nothing more precise
            known = self.backend.get_vocab()
            odd = sorted({c for text in texts for c in text if c not in known})
            raise spelling_error(odd, str(error)) from error
        return [encoding.ids for encoding in encodings]

    @property
    def spells_all(self) -> bool:
        """False for a BPE that would drop characters silently."""
        return self._spelling is None

    def check_spelling(self, texts: Sequence[str]) -> None:
        """Raises: InputError naming the characters that a BPE would drop silently."""
        if self._spelling is not None:
            self._spelling.check(texts)

    @functools.cached_property
    def _spelling(self) -> SpellingChecker | None:
        return make_spelling_checker(self.backend)

    def decode(self, ids: Ids) -> str:
        """Returns the text of `ids` without special tokens."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)

    @property
    def vocab_size(self) -> int:
        """Highest id, also of added tokens, + 1. Some ids below may have no token."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def num_text_ids(self) -> int:
        """Highest id that ordinary text can have, + 1."""
        added = self.backend.get_added_tokens_decoder()
        return 1 + max(i for i in self.backend.get_vocab().values() if i not in added)

    def id_to_token(self, token_id: int) -> str | None:
        """Returns the token with this id, or None."""
        return self.backend.id_to_token(token_id)

    def token_to_id(self, token: str) -> int | None:
        """Returns the id of this token, or None."""
        return self.backend.token_to_id(token)

    def is_added(self, token_id: int) -> bool:
        """Whether the token was added to the vocabulary, as [MASK] is: it is no piece of text."""
        return token_id in self.backend.get_added_tokens_decoder()

    def named_token_ids(self, but: int) -> list[int]:
        """Returns the ids of the added tokens that have names, except `but`."""
        added = self.backend.get_added_tokens_decoder().items()
        return [i for i, token in added if is_name(token.content) and i != but]

    def for_documents(self) -> Tokenizer:
        """Returns a copy that reads the names of added tokens as ordinary text.

        In documents such names are content: a web page about BERT may contain "[MASK]". Added
        tokens of white space only have no name and stay tokens.
        """
        from tokenizers import Tokenizer as Backend

        values = json.loads(self.backend.to_str())
        for token in values["added_tokens"]:
            token["special"] = token["special"] or is_name(token["content"])
        copy = Backend.from_str(json.dumps(values))
        copy.encode_special_tokens = True
        plain = Tokenizer(copy)
        plain.fingerprints = self.fingerprints
        return plain

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json into `folder`, which is created if it is missing."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        # Not by `backend.save`: its errors are no OSErrors.
        text = self.backend.to_str(pretty=True)
        (Path(folder) / "tokenizer.json").write_text(text, encoding="utf-8")

    @property
    def fingerprint(self) -> str:
        """A digest: equal for tokenizers that give every text the same ids."""
        return self.fingerprints[0]

    @functools.cached_property
    def fingerprints(self) -> tuple[str, ...]:
        """The fingerprint, followed by those that version 0.1 gave the same ids.

        In documents, that version read the names of added tokens that are not special as tokens. So
        the fingerprint of a tokenizer with such tokens has changed since.
        """
        found = backend_fingerprint(self.backend)
        added = self.backend.get_added_tokens_decoder().values()
        if any(is_name(token.content) and not token.special for token in added):
            now = hashlib.sha256(f"{found}, names are text".encode()).hexdigest()[:16]
            return tuple(dict.fromkeys((now, found, *self._earlier)))
        return tuple(dict.fromkeys((found, *self._earlier)))


def is_name(added_token: str) -> bool:
    """False for runs of spaces, which some tokenizers add as tokens of ordinary text."""
    return bool(added_token.strip())


def has_tokenizer(folder: str | Path) -> bool:
    """Whether the folder contains files of a tokenizer."""
    names = ("tokenizer.json", "tokenizer_config.json", "vocab.json")
    return any((Path(folder).expanduser() / name).is_file() for name in names)


@typed
def load_tokenizer(path: str | Path) -> Tokenizer:
    """Loads the tokenizer of a folder, or a tokenizer.json.

    transformers reads a published folder (with tokenizer_config.json). A folder with only
    vocab.json and merges.txt is GPT-2's byte-level BPE. GPT-2 has no mask token, so [MASK] is added
    with the next free id (50257), as in MDLM, from whichever of these files GPT-2 is read.

    Raises: InputError if there is no tokenizer at `path`, or if it cannot be parsed.
    """
    require(bool(path), "no tokenizer is given; set tokenizer= to a file or a folder")
    require_packages("data", "tokenizers")
    path = local_path(path, "tokenizer")
    try:
        found = None
        if path.is_dir():
            found = read_tokenizer_folder(path)
        elif path.is_file():
            found = read_tokenizer_file(path)
    except InputError:
        raise
    except Exception as error:  # the packages raise nothing more precise
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is not a tokenizer: {reason}") from error
    if found is None:
        raise InputError(
            f"{path} has no tokenizer; give a tokenizer.json, or a folder with it, with the files "
            "of a published tokenizer, or with vocab.json and merges.txt"
        )
    return Tokenizer(found.backend, found.earlier, found.misread)


def character_tokenizer(characters: str) -> Tokenizer:
    """Makes a tokenizer with an id per character, after [PAD] = 0 and [EOS] = 1, before [MASK]."""
    require_packages("data", "tokenizers")
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    tokens = ["[PAD]", "[EOS]", *dict.fromkeys(characters), "[MASK]"]
    backend = Backend(models.WordLevel({token: i for i, token in enumerate(tokens)}))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()  # joins without spaces
    backend.add_special_tokens(["[PAD]", "[EOS]", "[MASK]"])
    return Tokenizer(backend)


def check_token_ids(tokenizer: Tokenizer, mask_id: int | None, eos_id: int | None) -> None:
    """Raises: InputError if the tokenizer lacks an id, or uses `mask_id` for ordinary text."""
    for name, token_id in (("mask_id", mask_id), ("eos_id", eos_id)):
        require(
            token_id is None or tokenizer.id_to_token(token_id) is not None,
            f"the tokenizer has no token {name}={token_id} (it has {tokenizer.vocab_size} ids); "
            "add the token to the tokenizer or correct the id in the model's config",
        )
    if mask_id is not None and not tokenizer.is_added(mask_id):
        raise InputError(
            f"mask_id={mask_id} is the ordinary token {tokenizer.id_to_token(mask_id)!r}; "
            "set it to the tokenizer's mask token"
        )


def check_tokenizer(tokenizer: Tokenizer, model_config: ModelConfig) -> None:
    """Raises: InputError if the tokenizer does not fit the model's vocabulary and special ids."""
    check_token_ids(tokenizer, model_config.mask_id, model_config.eos_id)
    # Ordinary text has no added tokens, so a model without [MASK] needs no ids for them.
    size = tokenizer.vocab_size if model_config.mask_id is not None else tokenizer.num_text_ids
    require(
        size <= model_config.vocab_size,
        f"the tokenizer has {size} ids but the model only "
        f"vocab_size={model_config.vocab_size}; take the tokenizer that the model was trained with",
    )


def encode_pair(tokenizer: Tokenizer, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Tokenises a prompt and its continuation, so that both together decode to the whole text.

    Trailing spaces of the prompt move to the answer, since byte-level BPE joins them to the next
    word. If the tokens of the whole text do not begin with those of the prompt, a token spans the
    border ("=-" of "=" and "-5"). Then the answer is tokenised separately: all choices of an item
    share one prompt, which is tokenised as in generation and training.

    Raises: InputError if prompt and answer, tokenised separately, do not decode to the whole text,
      as with tokenizers that begin every text with a space.
    Source: LLaDA, eval_llada.py, `_encode_pair`, which follows lm-evaluation-harness. Both lose
      text where a token spans the border.
    """
    stripped = prompt.rstrip()
    answer = prompt[len(stripped) :] + answer
    whole, prompt_ids = tokenizer.encode_batch([stripped + answer, stripped])
    if whole[: len(prompt_ids)] == prompt_ids:
        return prompt_ids, whole[len(prompt_ids) :]
    answer_ids = tokenizer.encode(answer)
    require(
        tokenizer.decode(prompt_ids + answer_ids)
        == tokenizer.decode(prompt_ids) + tokenizer.decode(answer_ids),
        f"a token spans the end of the prompt {stripped[-20:]!r} and the answer {answer[:20]!r}, "
        "which this tokenizer cannot cut; begin the answer with a space or a line break",
    )
    return prompt_ids, answer_ids
