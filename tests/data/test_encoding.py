"""Long documents are tokenised in pieces, and have the tokens of the whole."""

import itertools
import random
import unicodedata

import pytest

from dials_jax.data import encoding
from dials_jax.data.encoding import encode_documents, word_end_finder
from dials_jax.data.tokenizer import Tokenizer, character_tokenizer

tokenizers = pytest.importorskip("tokenizers")

EOS = 1
GPT2 = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What the patterns treat differently, and what normalisation joins or reorders.
ODD = [
    " ", " ", "  ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u3000", "\u2028", "a", "word", "Ünder",
    "e\u0301", "\u0301", "\u0323\u0301", "\u3099", "か\u3099", "你好", "ガ", "。", "\uff0c", "、",
    "1", "23", "'s", "'LL", "'", "...", "!?", "-", "(", "\u0345", "\u212b", "\x85", "\x1c",
    "\u200b", "😀", "👩\u200d👧", "[MASK]", "<|endoftext|>", "<tool>", "한국", "\u1112\u1161\u11ab",
    "¨", "ﬁ",
]  # fmt: skip


def byte_level(pattern=None, normalizer=None, added=(), rstrip=False):
    """A byte-level BPE with merges over spaces, punctuation and letters."""
    from tokenizers import AddedToken, models, pre_tokenizers, trainers

    backend = tokenizers.Tokenizer(models.BPE())
    step = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    if pattern:
        split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        step = pre_tokenizers.Sequence([split, step])
    backend.pre_tokenizer, backend.normalizer = step, normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=1200, special_tokens=["[PAD]", "<|endoftext|>", "[MASK]"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), min_frequency=1,
    )  # fmt: skip
    rng = random.Random(0)
    backend.train_from_iterator(("".join(rng.choices(ODD, k=30)) for _ in range(300)), trainer)
    backend.add_tokens([AddedToken(text, normalized=False, rstrip=rstrip) for text in added])
    return Tokenizer(backend).for_documents()


KINDS = {
    "gpt2": lambda: byte_level(),
    "gpt2 spelt out": lambda: byte_level(GPT2),
    "qwen2": lambda: byte_level(QWEN2, tokenizers.normalizers.NFC(), ["<tool>"]),
    "llama3": lambda: byte_level(QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")),
    "gpt-neox": lambda: byte_level(None, tokenizers.normalizers.NFC(), ["  ", "   ", "\n\n"]),
    "characters": lambda: character_tokenizer(
        "".join(sorted(set("".join(ODD) + "b我们")))
    ).for_documents(),
}


def nasty_texts():
    rng = random.Random(1)
    for k in range(60):
        some = rng.sample(ODD, rng.randint(2, 12)) if k % 2 else ODD
        yield "".join(rng.choices(some, k=200))
    yield from (" " * 300, "\n" * 300, "a" * 300, "你" * 300, "\u0301" * 300, "[MASK]" * 40, "")
    yield from (
        " " * 100 + "a" + "\n" * 99 + "b" + "\r\n" * 50,
        "你好。\n\u3000\u3000我们\uff0c" * 30,
    )


def ids_in_pieces(text, plain, chunk):
    chunks = (text[i : i + chunk] for i in range(0, len(text), chunk))
    pieces = list(itertools.chain(*encode_documents([("here", chunks)], plain, EOS, None)))
    assert [piece.ends_document for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert pieces[-1].is_empty_document == (not text)
    return [i for piece in pieces for i in piece.ids], len(pieces)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_have_the_tokens_of_the_whole(kind, monkeypatch):
    monkeypatch.setattr(encoding, "PIECE_CHARACTERS", 7)
    plain = KINDS[kind]()
    cut = 0
    for text in nasty_texts():
        for chunk in (5, 7, 1000):
            found, count = ids_in_pieces(text, plain, chunk)
            assert found == [*plain.encode(text), EOS], repr(text)
            cut += count > 5
    assert cut > 100  # most of the texts


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "characters"])
def test_a_cut_at_any_boundary_is_exact(kind):
    """Not only at those that the size of the pieces happens to meet."""
    plain = KINDS[kind]()
    boundary = word_end_finder(plain)
    for text in itertools.islice(nasty_texts(), 20):
        whole = plain.encode(text)
        ends = {boundary(text[:i]) for i in range(len(text) + 1)}
        for end in sorted(ends):
            assert plain.encode(text[:end]) + plain.encode(text[end:]) == whole, text[end - 9 :]


def test_other_tokenizers_take_documents_whole(monkeypatch):
    from tokenizers import normalizers, pre_tokenizers

    monkeypatch.setattr(encoding, "PIECE_CHARACTERS", 7)
    ten_characters = byte_level(".{10}")
    lowercase = byte_level(QWEN2, normalizers.Lowercase())
    spaced = byte_level(QWEN2, None, ["\t"], rstrip=True)  # takes spaces that follow
    prefixed = byte_level()
    prefixed.backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    text = "a b " * 20
    for plain in (ten_characters, lowercase, spaced, prefixed):
        found, count = ids_in_pieces(text, plain, 8)
        assert count == 1 and found == [*plain.encode(text), EOS]


def test_no_canonical_composition_makes_or_meets_white_space():
    """What cutting before normalisation relies on."""
    normalize = tokenizers.normalizers.NFC().normalize_str
    characters = map(chr, (i for i in range(0x110000) if i != ord("|")))
    characters = [c for c in characters if unicodedata.category(c) not in ("Cn", "Co", "Cs")]
    for before, after in (("\n", " "), ("x\n", " x")):
        found = normalize("|".join(before + c + after for c in characters)).split("|")
        for c, text in zip(characters, found, strict=True):
            assert text.startswith(before) and text.endswith(after)
            inner = text[len(before) : -len(after)]
            assert c.isspace() or not any(map(str.isspace, inner)), c


def test_long_texts_pass_in_pieces_and_short_ones_in_batches(monkeypatch):
    plain = KINDS["gpt2"]()
    monkeypatch.setattr(encoding, "PIECE_CHARACTERS", 50)
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 200)
    sizes = []
    encode = Tokenizer.encode_batch
    monkeypatch.setattr(
        Tokenizer, "encode_batch", lambda self, t: sizes.append(sum(map(len, t))) or encode(self, t)
    )
    documents = [("long", ("word " * 1000,)), *(("short", ("a b",)) for _ in range(500))]
    batches = list(encode_documents(documents, plain, EOS, None))
    assert sum(piece.ends_document for batch in batches for piece in batch) == 501
    assert max(sizes) <= 200 + 2 * 50
