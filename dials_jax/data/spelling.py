"""Finds characters that a BPE has no symbol for; the package `tokenizers` drops them silently."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from dials_jax.errors import InputError


def spelling_error(characters: Iterable[str], reason: str) -> InputError:
    """Returns the error to raise for characters that a tokenizer cannot encode."""
    return InputError(
        f"the tokenizer cannot encode {''.join(characters)[:40]!r} ({reason}); change the text or "
        "take another tokenizer"
    )


def make_spelling_checker(backend: Any) -> SpellingChecker | None:
    """Returns a checker for a tokenizer that may drop characters silently, else None.

    Only a BPE without an unknown token can drop any; a byte-level one does not if its vocabulary
    has the symbols of all 256 bytes.
    """
    from tokenizers import models, pre_tokenizers

    model = backend.model
    if not isinstance(model, models.BPE) or model.unk_token is not None:
        return None
    vocab = backend.get_vocab(with_added_tokens=False)
    bytes_ = pre_tokenizers.ByteLevel.alphabet()
    if _symbols(backend, "é€😀") <= set(bytes_) and all(symbol in vocab for symbol in bytes_):
        return None
    if model.byte_fallback and all(f"<0x{byte:02X}>" in vocab for byte in range(256)):
        return None
    return SpellingChecker(backend, vocab)


class SpellingChecker:
    """Checks texts for characters that a BPE would drop; looks at each character only once."""

    def __init__(self, backend: Any, vocab: dict[str, int]):
        prefix = backend.model.continuing_subword_prefix or ""
        suffix = backend.model.end_of_word_suffix or ""
        bare = (token.removeprefix(prefix).removesuffix(suffix) for token in vocab)
        self.backend = backend
        self.symbols = {token for token in bare if len(token) == 1}
        self.checked: set[str] = set()
        added = backend.get_added_tokens_decoder().values()
        named = [t.content for t in added if not (t.special and backend.encode_special_tokens)]
        longest_first = sorted(map(re.escape, named), key=len, reverse=True)
        self.added = re.compile("|".join(longest_first)) if named else None

    def check(self, texts: Sequence[str]) -> None:
        """Raises: InputError naming the characters that would be lost."""
        found: set[str] = set()
        for text in texts:
            rest = self.added.sub("", text) if self.added else text
            found |= set(_normalised(self.backend, rest))
        new = found - self.checked
        lost = sorted(c for c in new if not _symbols(self.backend, c) <= self.symbols)
        if lost:
            raise spelling_error(lost, "its BPE has no symbol for them")
        self.checked |= new


def _normalised(backend: Any, text: str) -> str:
    return backend.normalizer.normalize_str(text) if backend.normalizer else text


def _symbols(backend: Any, text: str) -> set[str]:
    """Returns the symbols that the BPE begins to merge."""
    text = _normalised(backend, text)
    if backend.pre_tokenizer is None:
        return set(text)
    return set("".join(piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)))
