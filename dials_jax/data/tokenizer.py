"""Tokenizers: one thin wrapper, so that the rest of the library never meets their options."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from dials_jax.config import InputError, ModelConfig, require

Ids = Sequence[int] | Int[np.ndarray, "_"]


class Tokenizer:
    """A `tokenizers.Tokenizer` that adds no special tokens and neither pads nor cuts."""

    def __init__(self, backend: Any):
        # A tokenizer.json may carry both settings, and cutting would lose text in silence.
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Raises: InputError if a text holds a character that the vocabulary cannot spell."""
        try:
            encodings = self.backend.encode_batch(texts, add_special_tokens=False)
        except Exception as error:  # the package raises nothing more precise
            known = self.backend.get_vocab()
            odd = sorted({c for text in texts for c in text if c not in known})
            raise InputError(
                f"the tokenizer cannot encode {''.join(odd)[:40]!r} ({error}); "
                "change the text or take another tokenizer"
            ) from error
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Ids) -> str:
        """The text of `ids`, special tokens dropped."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)

    @property
    def vocab_size(self) -> int:
        """Highest id + 1, added tokens included; ids may have holes."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def num_text_ids(self) -> int:
        """Highest id that text can be spelt with + 1."""
        added = self.backend.get_added_tokens_decoder()
        return 1 + max(i for i in self.backend.get_vocab().values() if i not in added)

    def id_to_token(self, token_id: int) -> str | None:
        return self.backend.id_to_token(token_id)

    def token_to_id(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    def is_added(self, token_id: int) -> bool:
        """True for tokens that are control symbols rather than pieces of text."""
        return token_id in self.backend.get_added_tokens_decoder()

    def plain(self) -> Tokenizer:
        """A copy that reads the names of special tokens as ordinary text.

        Documents are content: a web page about BERT may say "[MASK]" and mean nothing by it.
        """
        from tokenizers import Tokenizer as Backend

        copy = Backend.from_str(self.backend.to_str())
        copy.encode_special_tokens = True
        return Tokenizer(copy)

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json into `folder`, which is made if needed."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.backend.save(str(Path(folder) / "tokenizer.json"))

    @functools.cached_property
    def fingerprint(self) -> str:
        """Equal for tokenizers that encode alike."""
        return hashlib.sha256(self.backend.to_str().encode()).hexdigest()[:16]


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Loads a tokenizer.json, a folder with one, or a folder with vocab.json and merges.txt.

    The last is GPT-2's byte-level BPE; it has no mask token, so [MASK] gets the next free id
    (50257), as in MDLM.

    Raises: InputError if there is no tokenizer at `path`, or if it does not parse.
    """
    from tokenizers import Tokenizer as Backend

    require(bool(path), "no tokenizer is given; set tokenizer= to a file or a folder")
    path = Path(path).expanduser()
    file = path / "tokenizer.json" if path.is_dir() else path
    vocab, merges = path / "vocab.json", path / "merges.txt"
    try:
        if file.is_file():
            return Tokenizer(Backend.from_file(str(file)))
        if vocab.is_file() and merges.is_file():
            return _byte_level_bpe(vocab, merges)
    except Exception as error:  # the package raises nothing more precise
        raise InputError(f"{path} is not a tokenizer: {error}") from error
    raise InputError(
        f"{path} has no tokenizer; give a tokenizer.json, or a folder with it or with "
        "vocab.json and merges.txt"
    )


def _byte_level_bpe(vocab: Path, merges: Path) -> Tokenizer:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    backend = Backend(models.BPE.from_file(str(vocab), str(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", "[MASK]"])
    return Tokenizer(backend)


def character_tokenizer(characters: str) -> Tokenizer:
    """One id a character, between [PAD] = 0, [EOS] = 1 and [MASK], the last id."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    tokens = ["[PAD]", "[EOS]", *dict.fromkeys(characters), "[MASK]"]
    backend = Backend(models.WordLevel({token: i for i, token in enumerate(tokens)}))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()  # joins without spaces
    backend.add_special_tokens(["[PAD]", "[EOS]", "[MASK]"])
    return Tokenizer(backend)


def check_ids(tokenizer: Tokenizer, mask_id: int | None, eos_id: int | None) -> None:
    """Raises: InputError if the tokenizer has no such tokens, or spells text with the mask."""
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
    """Raises: InputError if model and tokenizer do not belong together."""
    check_ids(tokenizer, model_config.mask_id, model_config.eos_id)
    # Text is never spelt with added tokens, so a model without [MASK] needs no room for them.
    size = tokenizer.vocab_size if model_config.mask_id is not None else tokenizer.num_text_ids
    require(
        size <= model_config.vocab_size,
        f"the tokenizer has {size} ids but the model only "
        f"vocab_size={model_config.vocab_size}; take the tokenizer that the model was trained with",
    )


def encode_pair(tokenizer: Tokenizer, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Tokenises a prompt and its continuation. Together the ids spell both texts.

    Trailing spaces of the prompt move to the answer, since byte-level BPE joins them to the next
    word. Where the tokens of the whole text do not begin with the prompt's, a token spans the cut
    ("=-" of "=" and "-5"). Then the answer is tokenised apart: all choices of an item keep one
    prompt, and it is tokenised as in generation and training.

    Raises: InputError where the answer apart does not continue the prompt's text, as with
      tokenizers that begin every text with a space.
    Source: LLaDA, eval_llada.py, `_encode_pair`, which follows lm-evaluation-harness. Both lose
      text where a token spans the cut.
    """
    stripped = prompt.rstrip()
    answer = prompt[len(stripped) :] + answer
    whole, prompt_ids = tokenizer.encode_batch([stripped + answer, stripped])
    if whole[: len(prompt_ids)] == prompt_ids:
        return prompt_ids, whole[len(prompt_ids) :]
    apart = tokenizer.encode(answer)
    require(
        tokenizer.decode(prompt_ids + apart)
        == tokenizer.decode(prompt_ids) + tokenizer.decode(apart),
        f"a token spans the end of the prompt {stripped[-20:]!r} and the answer {answer[:20]!r}, "
        "which this tokenizer cannot cut; begin the answer with a space or a line break",
    )
    return prompt_ids, apart
