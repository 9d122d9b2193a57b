"""From documents to tokens in bounded memory: a long document is tokenised in pieces.

Tokenizers work word by word, so pieces of whole words give the same tokens as the whole document.
With the patterns of words below, some ends of words can be found without context; documents are cut
only there. With any other pattern a document is tokenised as a whole.
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
    ends_document: bool  # the document ends here; EOS is its last token
    is_empty_document: bool  # the document has no other token than this EOS


_Piece = tuple[str, str, bool]  # where, text, whether the document ends here
# Maps a text to the number of characters before the last point where a word must end; 0: none.
FindWordEnd = Callable[[str], int]


def encode_documents(
    documents: Iterable[Document], tokenizer: Tokenizer, eos_id: int, mask_id: int | None
) -> Iterator[list[EncodedPiece]]:
    """Yields the tokens of a few documents or pieces at a time, EOS at the end of each document.

    Args:
      tokenizer: from `Tokenizer.for_documents()`: names of special tokens are ordinary text.

    Raises: InputError naming the document that contains the mask token.
    """
    begun = False  # tokens of this document were yielded before
    for batch in _batch_pieces(_cut_documents(documents, word_end_finder(tokenizer))):
        encoded = []
        ids_of = tokenizer.encode_batch([text for _, text, _ in batch])
        for (where, _, ends), ids in zip(batch, ids_of, strict=True):
            if mask_id in ids:
                raise InputError(f"{where}: contains the mask token; remove it")
            begun = begun or bool(ids)
            if ends:
                ids.append(eos_id)
            encoded.append(EncodedPiece(ids, ends, ends and not begun))
            begun = begun and not ends
        yield encoded


def _batch_pieces(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """Groups pieces into lists of about `BATCH_CHARACTERS`."""
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[1])
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _cut_documents(documents: Iterable[Document], find_word_end: FindWordEnd) -> Iterator[_Piece]:
    """Yields short documents as they are, and long ones in pieces of about `PIECE_CHARACTERS`."""
    for where, chunks in documents:
        held: list[str] = []
        parts = (
            chunk[i : i + PIECE_CHARACTERS]
            for chunk in chunks
            for i in range(0, len(chunk), PIECE_CHARACTERS)
        )
        for part in parts:
            end = find_word_end(part) if held else 0
            if end:
                yield where, "".join([*held, part[:end]]), False
                held = []
            held.append(part[end:])
        yield where, "".join(held), True


# The alternatives of the patterns by which GPT-2, Qwen2, Llama 3 and similar tokenizers find words.
# In all of them a space can only be the first character of a match or part of white space; a line
# break may also follow punctuation; and none looks back, or further than one character ahead.
_WORDS = {r" ?\p{L}+", r"[^\r\n\p{L}\p{N}]?\p{L}+", r"[^\r\n\p{L}\p{N}]?+\p{L}+"}
_OTHERS = {
    "'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'(?:[sdmt]|ll|ve|re)", "'(?i:[sdmt]|ll|ve|re)",
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"\p{N}", r"\p{N}+", r"\p{N}{1,3}", r" ?\p{N}+",
    r" ?[^\s\p{L}\p{N}]+", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]++[\r\n]*",
    r"\s*[\r\n]+", r"\s*[\r\n]", r"\s+(?!\S)", r"\s+",
}  # fmt: skip
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# So with any of them a word ends: before a space, unless white space precedes; after a line break
# between two characters that are not white space; and, for texts without either, between a Chinese
# or Japanese letter and the punctuation after it. Greedy: this matches up to the last such point.
_WORD_END = re.compile(
    r"(?s:.*)(?:(?<=\S)(?= )|(?<=\S\n)(?=\S)"
    r"|(?<=[\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5])(?=[\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f]))"
)


def word_end_finder(tokenizer: Tokenizer) -> FindWordEnd:
    """Returns a function that finds where a text may be cut without changing its tokens.

    For a tokenizer whose words are not known it always returns 0: do not cut.
    """
    backend = tokenizer.backend
    normalizer, pattern = _settings_of(backend.normalizer), _word_pattern(backend.pre_tokenizer)
    # These added tokens are found in the text before it is split into words.
    added = [
        token
        for token in backend.get_added_tokens_decoder().values()
        if not (token.special and backend.encode_special_tokens)
    ]
    if pattern == "" and not normalizer and not added:
        return len  # every character is a word
    known = (
        _is_known(pattern)
        # NFC never composes characters across a space or a line break.
        and normalizer.get("type") in (None, "NFC")
        and not any(token.lstrip or token.rstrip for token in added)
        and not any(re.search(r"\S\s|\s\S", t.content) or _WORD_END.match(t.content) for t in added)
    )
    return _last_word_end if known else lambda text: 0


def _last_word_end(text: str) -> int:
    found = _WORD_END.match(text)
    return found.end() if found else 0


def _is_known(pattern: str | None) -> bool:
    """Whether the pattern consists of alternatives listed above."""
    if not pattern:
        return False
    alternatives = set(re.split(r"\|(?![^(]*\))", pattern))  # not those inside brackets
    return (
        alternatives <= _WORDS | _OTHERS and bool(alternatives & _WORDS) and r"\s+" in alternatives
    )


def _word_pattern(pre_tokenizer: Any) -> str | None:
    """Returns the regular expression that finds words; "": each character is one; None: unknown.

    A conversion to byte-level symbols may follow, since it works word by word.
    """
    settings = _settings_of(pre_tokenizer)
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


def _settings_of(part: Any) -> dict[str, Any]:
    """Returns a part of a tokenizer as tokenizer.json has it; an empty dict for None."""
    return json.loads(part.__getstate__()) if part is not None else {}
