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

# Tokenizer classes that a folder has as code, and model types, with the class of transformers that
# does the same. Dream's is Qwen2's with other special tokens.
KNOWN_TYPES = {"DreamTokenizer": "qwen2", "Dream": "qwen2"}
GPT2_TYPES = (None, "gpt2", "mdlm")  # models whose vocab.json and merges.txt are GPT-2's


@dataclass(frozen=True)
class FoundTokenizer:
    """A folder's tokenizer (`tokenizers.Tokenizer`).

    Attributes:
      earlier: fingerprints under which version 0.1 knew the same ids.
      misread: fingerprint of the tokenizer that version 0.1 read instead, if its ids were wrong.
    """

    backend: Any
    earlier: tuple[str, ...] = ()
    misread: str | None = None


def read_tokenizer_folder(folder: Path) -> FoundTokenizer | None:
    """None for a folder without a tokenizer.

    If GPT-2's rules, or tokenizer.json, give the same ids as transformers, the tokenizer made from
    them is returned: then the fingerprint does not depend on the version of transformers.

    Raises: InputError for files that contradict each other, or that transformers cannot read.
    """
    own = _own_readings(folder)
    if _is_published(folder):
        wanted, is_gpt2 = _read_published(folder)
    elif own:
        wanted, is_gpt2 = own[-1], (folder / "vocab.json").is_file() and follows_gpt2(own[-1])
    else:
        return None
    backend = next((x for x in own if x is wanted or encode_alike(x, wanted)), wanted)
    check_added_token_ids(backend, _declared_ids(folder), folder)
    before = own[-1] if own else backend  # what version 0.1 read
    same = encode_alike(before, backend, but=("special",))
    if not (folder / "tokenizer.json").is_file() and own:
        before = add_mask_token(before)
    found = backend_fingerprint(before)
    if is_gpt2:
        backend = add_mask_token(backend)
    return FoundTokenizer(backend, (found,)) if same else FoundTokenizer(backend, misread=found)


def read_tokenizer_file(file: Path) -> FoundTokenizer:
    """A tokenizer.json. Raises: InputError if its ids contradict each other."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(file))
    check_added_token_ids(backend, _ids_in_file(file), file)
    return FoundTokenizer(backend)


def backend_fingerprint(backend: Any) -> str:
    return hashlib.sha256(backend.to_str().encode()).hexdigest()[:16]


def _own_readings(folder: Path) -> list[Any]:
    """The tokenizers of GPT-2's two files and of tokenizer.json, if they exist."""
    from tokenizers import Tokenizer

    readings = []
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    if vocab.is_file() and merges.is_file():
        readings.append(build_gpt2_bpe(vocab, merges))
    if (folder / "tokenizer.json").is_file():
        readings.append(Tokenizer.from_file(str(folder / "tokenizer.json")))
    return readings


def build_gpt2_bpe(vocab: Path, merges: Path) -> Any:
    """GPT-2's byte-level BPE; <|endoftext|> is its only special token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    backend = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return add_special_token(backend, "<|endoftext|>")


def follows_gpt2(backend: Any) -> bool:
    """Whether text is split by GPT-2's rules."""
    from tokenizers import models, pre_tokenizers

    split = backend.pre_tokenizer
    return (
        isinstance(backend.model, models.BPE)
        and backend.normalizer is None
        and isinstance(split, pre_tokenizers.ByteLevel)
        and split.use_regex
    )


def add_mask_token(backend: Any) -> Any:
    """Adds [MASK] with the next free id (50257, as in MDLM) to a tokenizer without a mask token."""
    added = backend.get_added_tokens_decoder().values()
    has_one = any("mask" in token.content.lower() for token in added)
    return backend if has_one else add_special_token(backend, "[MASK]")


def add_special_token(backend: Any, token: str) -> Any:
    """Adds a token with the id after the highest.

    The package would use the number of tokens as the id, which is taken if ids have holes.
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
    """Raises: InputError if two tokens share an id, or an added one differs from `declared`.

    The package numbers added tokens itself, so they get other ids if the ids have holes.
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
    """The ids of added tokens in every file that states them."""
    declared = list(_ids_in_file(folder / "tokenizer.json"))
    if (folder / "added_tokens.json").is_file():
        declared += read_json(folder / "added_tokens.json").items()
    for i, token in _settings(folder).get("added_tokens_decoder", {}).items():
        declared.append((token["content"], int(i)))
    return declared


def _ids_in_file(file: Path) -> list[tuple[str, int]]:
    added = read_json(file).get("added_tokens") or [] if file.is_file() else []
    return [(token["content"], token["id"]) for token in added]


# ------------------------------------------------------------------------------------ comparing


def encode_alike(a: Any, b: Any, but: Sequence[str] = ()) -> bool:
    """Whether two tokenizers give the same ids for every text.

    Args:
      but: settings that may differ. Documents, for example, never hold special tokens.
    """
    return a is b or _without(_rules(a), *but) == _without(_rules(b), *but)


def _rules(backend: Any) -> dict[str, Any]:
    """Everything that ids depend on."""
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
    added = [{k: v for k, v in token.items() if k not in names} for token in rules["added_tokens"]]
    return rules | {"added_tokens": added}


def _pre_tokenizer(values: dict[str, Any] | None) -> dict[str, Any] | None:
    """Without settings that only concern offsets."""
    if values is None:
        return None
    if values["type"] == "Sequence":
        return values | {"pretokenizers": [_pre_tokenizer(v) for v in values["pretokenizers"]]}
    return {name: value for name, value in values.items() if name != "trim_offsets"}


# ------------------------------------------------------------------------------------ published


def _settings(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    return read_json(file) if file.is_file() else {}


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    return read_json(file) if file.is_file() else {}


def _is_published(folder: Path) -> bool:
    """Whether transformers is needed to read the files."""
    complete, config = (folder / "tokenizer.json").is_file(), _config(folder)
    if "format" in config and complete:
        return False  # a model folder of this library; conversion completed tokenizer.json
    if (folder / "tokenizer_config.json").is_file():
        # Without any of these, transformers has no more information than the other files.
        return bool({"tokenizer_class", "auto_map"} & _settings(folder).keys()) or (
            "model_type" in config
        )
    # If neither it nor tokenizer.json says how to read the two files, the kind of model does.
    two_files = (folder / "vocab.json").is_file()
    return two_files and not complete and config.get("model_type") not in GPT2_TYPES


def _read_published(folder: Path) -> tuple[Any, bool]:
    """The fast tokenizer that transformers makes of the files; whether it is plain GPT-2's."""
    require_packages("data", "transformers", "tokenizers")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # "PyTorch was not found"
    from transformers import AutoTokenizer, PreTrainedTokenizerFast, logging
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    settings, complete = _settings(folder), (folder / "tokenizer.json").is_file()
    name = settings.get("tokenizer_class") or ""
    kind = KNOWN_TYPES.get(name or _config(folder).get("model_type"))
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
