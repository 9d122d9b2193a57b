"""Folders of published tokenizers in small, as their owners lay them out.

The vocabulary is the beginning of GPT-2's: its 256 symbols and first 700 merges.
"""

import json
import random
import shutil
from pathlib import Path

CUT = Path(__file__).parent / "gpt2_cut"
QWEN = {"<|endoftext|>": True, "<|im_start|>": True, "<|im_end|>": True, "<tool_call>": False}
DREAM = QWEN | {"<|beginoftext|>": True, "<|mask|>": True}
LLADA = ("<|startoftext|>", "<|endoftext|>", "[CLS]", "[gMASK]", "<|reserved_token_0|>")
LLADA_SPLIT = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)


def write(path, values):
    path.write_text(json.dumps(values, indent=1), encoding="utf-8")


def two_files(folder, end_of_text=False):
    """vocab.json and merges.txt; returns the number of tokens."""
    from tokenizers import pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    lines = (CUT / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens += [line.replace(" ", "") for line in lines] + ["<|endoftext|>"] * end_of_text
    write(folder / "vocab.json", {token: i for i, token in enumerate(tokens)})
    shutil.copy(CUT / "merges.txt", folder)
    return len(tokens)


def gpt2(folder, complete=True):
    """GPT-2's: tokenizer.json came later than the two files."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    two_files(folder, end_of_text=True)
    write(folder / "tokenizer_config.json", {"model_max_length": 1024})
    write(folder / "config.json", {"model_type": "gpt2"})
    if complete:
        files = str(folder / "vocab.json"), str(folder / "merges.txt")
        backend = Tokenizer(models.BPE.from_file(*files))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken("<|endoftext|>", normalized=True)])
        backend.save(str(folder / "tokenizer.json"))
    return folder


def _added(names, first):
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    return {
        str(first + i): {"content": name, "special": special, **flags}
        for i, (name, special) in enumerate(names.items())
    }


def qwen2(folder, names=QWEN, **settings):
    """Qwen2's slow layout: four files and no tokenizer.json."""
    first = two_files(folder)
    special = [name for name, special in names.items() if special]
    ends = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    write(folder / "added_tokens.json", {name: first + i for i, name in enumerate(names)})
    write(folder / "special_tokens_map.json", {"additional_special_tokens": special[1:3], **ends})
    config = {
        "added_tokens_decoder": _added(names, first), "additional_special_tokens": special[1:3],
        "errors": "replace", "split_special_tokens": False, "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None, "bos_token": None, **ends,
    }  # fmt: skip
    write(folder / "tokenizer_config.json", config | settings)
    write(folder / "config.json", {"model_type": "qwen2"})
    return folder


def dream(folder):
    """Dream's: a class of its own, whose code the folder would bring."""
    code = {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]}
    special = {"bos_token": "<|beginoftext|>", "mask_token": "<|mask|>"}
    qwen2(folder, DREAM, tokenizer_class="DreamTokenizer", auto_map=code, **special)
    (folder / "tokenization_dream.py").write_text("raise SystemExit('the code of the folder ran')")
    write(folder / "config.json", {"model_type": "Dream", "auto_map": {"AutoConfig": "c.Config"}})
    return folder


def llada(folder):
    """LLaDA's: tokenizer.json with its own way to split, and tokenizer_config.json."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    first = two_files(folder)
    files = [folder / "vocab.json", folder / "merges.txt"]
    backend = Tokenizer(models.BPE.from_file(*map(str, files)))
    split = pre_tokenizers.Split(Regex(LLADA_SPLIT), "isolated")
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, by_bytes])
    backend.decoder = decoders.ByteLevel()
    names = (*LLADA, "<|mdm_mask|>")
    backend.add_special_tokens(list(names))
    backend.save(str(folder / "tokenizer.json"))
    for file in files:
        file.unlink()
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "cls_token": "[CLS]"}
    write(folder / "special_tokens_map.json", special)
    config = {
        "added_tokens_decoder": _added(dict.fromkeys(names, True), first),
        "add_bos_token": False, "add_eos_token": False, "fast_tokenizer": True,
        "tokenizer_class": "PreTrainedTokenizerFast", "gmask_token": "[gMASK]",
    }  # fmt: skip
    write(folder / "tokenizer_config.json", config | special)
    write(folder / "config.json", {"model_type": "llada", "auto_map": {"AutoConfig": "c.Config"}})
    return folder


PIECES = (
    "the cat sat on the mat", "It's IT'S don't DON'T we'll You'Re", "In 2024 Tom had 12345 apples",
    "3.14159e-10 1,250,000 0x7f 100% $5", "naïve café", "cafe\u0301 A\u030angstro\u0308m", "Straße",
    "日本語のテキスト", "한국어", "العربية", "हिन्दी", "Ελληνικά", "½²³ ٣٤ Ⅷ", "a\n\nb",
    "😀 \U0001f469\u200d\U0001f467\U0001f3fd", "\u00a0\u2003\u200b\ufeff", "\x00\x01\x7f",
    "\n", "\r\n\r\n", "\t\t", "   ",
    "      x", "line  \n  next", "antidisestablishmentarianism" * 4, "a" * 300, "!!!???...",
    "def f(x):\n    return x**2  # square\n", "<html>&nbsp;</html>", "https://a.b/c?d=e&f=g_h",
    "--- *** ___", "([{<>}])", "\u2019\u201c\u201d\u2014\u2026", "<|endoftext|>",
    "<|mask|>", "<|end", "|>", "",
    "<|im_start|>user\nHi<|im_end|>\n", "<tool_call>{}</tool_call>", "<|mdm_mask|>",
    "[CLS][gMASK]", "<|startoftext|>", "<|reserved_token_0|>",
)  # fmt: skip


def texts(count=260):
    """Every piece, and pieces strung together."""
    dice = random.Random(0)
    joined = [
        dice.choice(("", " ", "  ", "\n", ". ")).join(dice.choices(PIECES, k=dice.randint(2, 6)))
        for _ in range(count - len(PIECES))
    ]
    return [*PIECES, *joined]
