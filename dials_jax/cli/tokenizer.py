"""Trains a tokenizer on text, and says which numbers a model needs for it.

dials tokenizer train --text texts/ --vocab-size 8192 --out data/tokenizer

Byte-level BPE: every text has ids. The folder is read by every command that takes a tokenizer, and
by AutoTokenizer of transformers. [PAD], <|endoftext|> and [MASK] have the ids 0, 1 and 2.
"""

from __future__ import annotations

from dials_jax.cli.options import Options
from dials_jax.stopping import keeping


def tokenizer_command(argv: list[str] | None = None) -> None:
    """Runs the command."""
    given = tokenizer_options().read(argv)
    from dials_jax.data.tokenizer_training import model_ids, train_tokenizer

    with keeping(lambda: "nothing is kept; the same command starts again"):
        tokenizer = train_tokenizer(
            given.text, given.vocab_size, given.out, chat=given.chat, text_field=given.text_field
        )
    missing = given.vocab_size - tokenizer.vocab_size
    if missing:
        print(f"the text has {missing} fewer tokens than asked for: nothing else occurs twice")
    ids = model_ids(given.out).items()
    options = [f"--model.{name.replace('_', '-')} {value}" for name, value in ids]
    print(f"{given.out}: {tokenizer!r}; of a model for it:", " ".join(options), sep="\n  ")


def tokenizer_options() -> Options:
    parser = Options("tokenizer", __doc__)
    parser.add_argument("action", choices=("train",), help="what to do")
    parser.add_argument(
        "--text", nargs="+", required=True, metavar="PATH", help=".txt, .jsonl (.gz, .xz), folders"
    )
    parser.add_argument(
        "--vocab-size", type=int, required=True, metavar="N", help="ids, special ones included"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--chat", action="store_true", help="also tokens and template of conversations (ChatML)"
    )
    parser.add_argument(
        "--text-field", default="text", metavar="NAME", help="of JSON lines; default: text"
    )
    return parser
