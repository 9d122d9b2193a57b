"""Reads the tokenizer of a folder.

    tokenizer_config.json    a published folder: transformers reads its files
    tokenizer.json           the whole tokenizer, as `Tokenizer.save` writes it
    vocab.json, merges.txt   GPT-2's byte-level BPE

Only a published folder needs transformers. No code of a folder is ever run.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dials_jax.errors import InputError, require, require_packages
from dials_jax.files import read_json

# Tokenizer classes that a folder defines in its own code, and model types: the type in transformers
# that does the same. Dream's tokenizer is Qwen2's with other special tokens.
KNOWN_TYPES = {"DreamTokenizer": "qwen2", "Dream": "qwen2"}
GPT2_TYPES = (None, "gpt2", "mdlm")  # models whose vocab.json and merges.txt are GPT-2's


@dataclass(frozen=True)
class FoundTokenizer:
    """The tokenizer that was read from a folder or file.

    Attributes:
      backend: a `tokenizers.Tokenizer`.
      earlier: fingerprints under which version 0.1 knew the same ids.
      misread: fingerprint of the tokenizer that version 0.1 read instead, if its ids were wrong.
    """

    backend: Any
    earlier: tuple[str, ...] = ()
    misread: str | None = None


def read_tokenizer_folder(folder: Path) -> FoundTokenizer | None:
    """Reads the tokenizer of a folder; None if the folder has none.

    If tokenizer.json, or vocab.json and merges.txt by GPT-2's rules, give the same ids as
    transformers, the tokenizer made from them is returned. So the fingerprint does not depend on
    the version of transformers.

    Raises: InputError for files that contradict each other, or that transformers cannot read.
    """
    own = _own_backends(folder)
    if _is_published(folder):
        wanted, is_gpt2 = _read_published(folder)
    elif own:
        wanted = own[-1]
        is_gpt2 = (folder / "vocab.json").is_file() and follows_gpt2(wanted)
    else:
        return None
    backend = next((x for x in own if have_same_ids(x, wanted)), wanted)
    check_added_token_ids(backend, _declared_ids(folder), folder)
    former = own[-1] if own else backend  # the one that version 0.1 read
    was_right = have_same_ids(former, backend, but=("special",))  # documents have no special tokens
    if own and not (folder / "tokenizer.json").is_file():
        former = add_mask_token(former)
    fingerprint = backend_fingerprint(former)
    if is_gpt2:
        backend = add_mask_token(backend)
    if was_right:
        return FoundTokenizer(backend, earlier=(fingerprint,))
    return FoundTokenizer(backend, misread=fingerprint)


def read_tokenizer_file(file: Path) -> FoundTokenizer:
    """Reads a tokenizer.json. Raises: InputError if its ids contradict each other."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(file))
    check_added_token_ids(backend, _ids_in_file(file), file)
    return FoundTokenizer(backend)


def backend_fingerprint(backend: Any) -> str:
    """Returns a digest of everything in the tokenizer, 16 hexadecimal digits."""
    return hashlib.sha256(backend.to_str().encode()).hexdigest()[:16]


def _own_backends(folder: Path) -> list[Any]:
    """Reads GPT-2's two files, and tokenizer.json, as far as they exist; without transformers."""
    from tokenizers import Tokenizer

    backends = []
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    if vocab.is_file() and merges.is_file():
        backends.append(build_gpt2_bpe(vocab, merges))
    if (folder / "tokenizer.json").is_file():
        backends.append(Tokenizer.from_file(str(folder / "tokenizer.json")))
    return backends


def build_gpt2_bpe(vocab: Path, merges: Path) -> Any:
    """Makes GPT-2's byte-level BPE; <|endoftext|> is its only special token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    backend = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return add_special_token(backend, "<|endoftext|>")


def follows_gpt2(backend: Any) -> bool:
    """Whether the tokenizer splits text by GPT-2's rules."""
    from tokenizers import models, pre_tokenizers

    split = backend.pre_tokenizer
    return (
        isinstance(backend.model, models.BPE)
        and backend.normalizer is None
        and isinstance(split, pre_tokenizers.ByteLevel)
        and split.use_regex
    )


def add_mask_token(backend: Any) -> Any:
    """Adds [MASK] with the next free id (50257, as in MDLM), unless there is a mask token."""
    added = backend.get_added_tokens_decoder().values()
    has_one = any("mask" in token.content.lower() for token in added)
    return backend if has_one else add_special_token(backend, "[MASK]")


def add_special_token(backend: Any, token: str) -> Any:
    """Adds a token with the id after the highest.

    The package itself would take the number of tokens as the id, which is in use if some lower id
    is not.
    """
    from tokenizers import Tokenizer

    ids = backend.get_vocab(with_added_tokens=True)
    if token not in ids and max(ids.values(), default=-1) + 1 != len(ids):
        values = json.loads(backend.to_str())
        values["model"]["vocab"] = dict(sorted(ids.items(), key=lambda item: item[1]))
        values["model"]["vocab"][token] = max(ids.values()) + 1
        backend = Tokenizer.from_str(json.dumps(values))
    backend.add_special_tokens([token])
    return backend


def check_added_token_ids(backend: Any, declared: Sequence[tuple[str, int]], where: Path) -> None:
    """Checks the ids of added tokens, since the package numbers these itself.

    If some lower id is not in use, they get other ids than their files say.

    Args:
      declared: (token, id) as the files say.
      where: the folder or file, for messages.

    Raises: InputError if two tokens share an id, or a token has another id than `declared`.
    """
    ids = backend.get_vocab(with_added_tokens=True)
    id_, times = Counter(ids.values()).most_common(1)[0] if ids else (0, 0)
    if times > 1:
        names = sorted(token for token, i in ids.items() if i == id_)
        raise InputError(
            f"{where}: the tokens {', '.join(map(repr, names[:3]))} would share the id {id_}, "
            "since the ids have holes; fill these with unused tokens"
        )
    for token, i in declared:
        require(
            ids.get(token) == i,
            f"{where}: the files give the token {token!r} the id {i}, but it would be read as "
            f"{ids.get(token)}; fill holes of the ids with unused tokens, and let all files agree",
        )


def _declared_ids(folder: Path) -> list[tuple[str, int]]:
    """Returns (token, id) of the added tokens in every file that states them."""
    declared = list(_ids_in_file(folder / "tokenizer.json"))
    if (folder / "added_tokens.json").is_file():
        declared += read_json(folder / "added_tokens.json").items()
    for i, token in _tokenizer_config(folder).get("added_tokens_decoder", {}).items():
        declared.append((token["content"], int(i)))
    return declared


def _ids_in_file(file: Path) -> list[tuple[str, int]]:
    added = read_json(file).get("added_tokens") or [] if file.is_file() else []
    return [(token["content"], token["id"]) for token in added]


# ------------------------------------------------------------------------------------ comparing


def have_same_ids(a: Any, b: Any, but: Sequence[str] = ()) -> bool:
    """Whether two tokenizers give the same ids for every text.

    Args:
      but: settings of added tokens that may differ, such as "special".
    """
    return a is b or _without(_rules(a), *but) == _without(_rules(b), *but)


def _rules(backend: Any) -> dict[str, Any]:
    """Returns all settings that ids depend on."""
    values = json.loads(backend.to_str())
    model = {name: value for name, value in values["model"].items() if value not in ("", None)}
    if not values["normalizer"]:
        for token in values["added_tokens"]:
            token["normalized"] = False  # it has no effect
    return {
        "model": model,
        "normalizer": values["normalizer"],
        "pre_tokenizer": _pre_tokenizer(values["pre_tokenizer"]),
        "added_tokens": sorted(values["added_tokens"], key=lambda token: token["id"]),
        "special_as_text": backend.encode_special_tokens,
    }


def _without(rules: dict[str, Any], *names: str) -> dict[str, Any]:
    """Removes settings of added tokens."""
    added = [{k: v for k, v in token.items() if k not in names} for token in rules["added_tokens"]]
    return rules | {"added_tokens": added}


def _pre_tokenizer(values: dict[str, Any] | None) -> dict[str, Any] | None:
    """Removes settings that only concern offsets."""
    if values is None:
        return None
    if values["type"] == "Sequence":
        return values | {"pretokenizers": [_pre_tokenizer(v) for v in values["pretokenizers"]]}
    return {name: value for name, value in values.items() if name != "trim_offsets"}


# ------------------------------------------------------------------------------------ published


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    return read_json(file) if file.is_file() else {}


def _model_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    return read_json(file) if file.is_file() else {}


def _is_published(folder: Path) -> bool:
    """Whether transformers is needed to read the files."""
    complete, config = (folder / "tokenizer.json").is_file(), _model_config(folder)
    if "format" in config and complete:
        return False  # a model folder of this library; conversion completed tokenizer.json
    if (folder / "tokenizer_config.json").is_file():
        # Without any of these, transformers has no more information than the other files.
        return bool({"tokenizer_class", "auto_map"} & _tokenizer_config(folder).keys()) or (
            "model_type" in config
        )
    # Otherwise only the type of the model tells how to read vocab.json and merges.txt.
    two_files = (folder / "vocab.json").is_file()
    return two_files and not complete and config.get("model_type") not in GPT2_TYPES


def _read_published(folder: Path) -> tuple[Any, bool]:
    """Reads a fast tokenizer by transformers; returns whether it is GPT-2's without a mask, too."""
    require_packages("data", "transformers", "tokenizers")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # "PyTorch was not found"
    from transformers import AutoTokenizer, PreTrainedTokenizerFast, logging
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    settings, complete = _tokenizer_config(folder), (folder / "tokenizer.json").is_file()
    name = settings.get("tokenizer_class") or ""
    kind = KNOWN_TYPES.get(name or _model_config(folder).get("model_type"))
    foreign = not (tokenizer_class_from_name(name) if name else "auto_map" not in settings)
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    reader: Any = AutoTokenizer
    if kind and not complete:
        options["tokenizer_type"] = kind
    elif foreign:
        require(
            complete,
            f"{folder}: its tokenizer is code of its own ({name or 'auto_map'}), which is not run; "
            "save it as a tokenizer.json",
        )
        reader = PreTrainedTokenizerFast
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns about config.json, which describes the model
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = reader.from_pretrained(str(folder), **options)
    finally:
        logging.set_verbosity(verbosity)
    require(
        getattr(found, "backend_tokenizer", None) is not None,
        f"{folder}: transformers has only a slow tokenizer for it ({type(found).__name__}); save "
        "it as a tokenizer.json",
    )
    backend = found.backend_tokenizer
    backend.post_processor = None  # would add special tokens, which are never wanted here
    return backend, type(found).__name__ == "GPT2Tokenizer" and found.mask_token is None
