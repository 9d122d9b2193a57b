"""From documents to tokens in bounded memory: a long document is tokenised in pieces.

Tokenizers work word by word, so pieces that begin and end with a word give the tokens of the whole.
For the patterns below, places where a word must end can be found without context; a document whose
tokenizer splits by another pattern is tokenised as a whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from dials_jax.data.records import PIECE_CHARACTERS, Document
from dials_jax.data.tokenizer import Tokenizer
from dials_jax.errors import InputError

BATCH_CHARACTERS = 1_000_000  # tokenised together; bounds the memory that packing takes


class EncodedPiece(NamedTuple):
    """Tokens of a document, or of a piece of a long one."""

    ids: list[int]
    ends: bool  # the document ends here; EOS is its last token
    empty: bool  # the document is nothing but this EOS


_Piece = tuple[str, str, bool]  # where, text, whether the document ends here
# The number of characters up to the last place in a text where a word must end; 0: none.
FindWordEnd = Callable[[str], int]


def encode_documents(
    documents: Iterable[Document], plain: Tokenizer, eos_id: int, mask_id: int | None
) -> Iterator[list[EncodedPiece]]:
    """Yields the tokens of a few documents or pieces at a time, EOS at the end of each document.

    Args:
      plain: `Tokenizer.for_documents()`, so that names of special tokens are ordinary text.

    Raises: InputError, naming the document, if it contains the mask token.
    """
    begun = False  # tokens of this document were yielded before
    for batch in _batches(_pieces(documents, word_end_finder(plain))):
        encoded = []
        ids_of = plain.encode_batch([text for _, text, _ in batch])
        for (where, _, ends), ids in zip(batch, ids_of, strict=True):
            if mask_id in ids:
                raise InputError(f"{where}: contains the mask token; remove it")
            begun = begun or bool(ids)
            if ends:
                ids.append(eos_id)
            encoded.append(EncodedPiece(ids, ends, ends and not begun))
            begun = begun and not ends
        yield encoded


def _batches(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[1])
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _pieces(documents: Iterable[Document], boundary: FindWordEnd) -> Iterator[_Piece]:
    """Short documents as they are, long ones in pieces of about `PIECE_CHARACTERS`."""
    for where, chunks in documents:
        held: list[str] = []
        parts = (
            chunk[i : i + PIECE_CHARACTERS]
            for chunk in chunks
            for i in range(0, len(chunk), PIECE_CHARACTERS)
        )
        for part in parts:
            end = boundary(part) if held else 0
            if end:
                yield where, "".join([*held, part[:end]]), False
                held = []
            held.append(part[end:])
        yield where, "".join(held), True


# The alternatives of the patterns by which GPT-2, Qwen2, Llama 3 and their kin find words. In all,
# a space can only be a match's first character or part of white space; a line break may also follow
# punctuation; and none looks at what stands before it, or further than one character ahead.
_WORDS = {r" ?\p{L}+", r"[^\r\n\p{L}\p{N}]?\p{L}+", r"[^\r\n\p{L}\p{N}]?+\p{L}+"}
_OTHERS = {
    "'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'(?:[sdmt]|ll|ve|re)", "'(?i:[sdmt]|ll|ve|re)",
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"\p{N}", r"\p{N}+", r"\p{N}{1,3}", r" ?\p{N}+",
    r" ?[^\s\p{L}\p{N}]+", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]++[\r\n]*",
    r"\s*[\r\n]+", r"\s*[\r\n]", r"\s+(?!\S)", r"\s+",
}  # fmt: skip
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# So with any of them words end: before a space, unless white space precedes; after a line break
# between two characters that are not white space; and, for texts without either, between Chinese or
# Japanese letters and the punctuation behind them. Greedy: the last such place.
_WORD_END = re.compile(
    r"(?s:.*)(?:(?<=\S)(?= )|(?<=\S\n)(?=\S)"
    r"|(?<=[\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5])(?=[\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f]))"
)


def word_end_finder(plain: Tokenizer) -> FindWordEnd:
    """Where texts may be cut so that the pieces have the tokens of the whole."""
    backend = plain.backend
    normalizer, pattern = _settings(backend.normalizer), _first_pattern(backend.pre_tokenizer)
    # Other added tokens are found in the text before words are.
    added = [
        token
        for token in backend.get_added_tokens_decoder().values()
        if not (token.special and backend.encode_special_tokens)
    ]
    if pattern == "" and not normalizer and not added:
        return len  # every character is a word
    known = (
        _are_known(pattern)
        # The canonical composition of a text never joins anything over a space or a line break.
        and normalizer.get("type") in (None, "NFC")
        and not any(token.lstrip or token.rstrip for token in added)
        and not any(re.search(r"\S\s|\s\S", t.content) or _WORD_END.match(t.content) for t in added)
    )
    return _last_word_end if known else lambda text: 0


def _last_word_end(text: str) -> int:
    found = _WORD_END.match(text)
    return found.end() if found else 0


def _are_known(pattern: str | None) -> bool:
    if not pattern:
        return False
    alternatives = set(re.split(r"\|(?![^(]*\))", pattern))  # not those inside of brackets
    return (
        alternatives <= _WORDS | _OTHERS and bool(alternatives & _WORDS) and r"\s+" in alternatives
    )


def _first_pattern(pre_tokenizer: Any) -> str | None:
    """The regular expression by which words are found, "" for single characters, None: unknown.

    Byte-level symbols may follow; they are made word by word.
    """
    settings = _settings(pre_tokenizer)
    first, *rest = settings.get("pretokenizers", [settings]) or [{}]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False}
    for step in rest:
        if step | byte_level != step:
            return None
    if first | byte_level == first and first["use_regex"]:
        return _GPT2
    if first.get("type") != "Split" or (first["behavior"], first["invert"]) != ("Isolated", False):
        return None
    pattern = first["pattern"]
    return pattern.get("Regex", "" if pattern.get("String") == "" else None)


def _settings(part: Any) -> dict[str, Any]:
    """How a part of a tokenizer is written in tokenizer.json; empty for none."""
    return json.loads(part.__getstate__()) if part is not None else {}
