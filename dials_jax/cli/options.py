"""Options that several commands share. Only the standard library is imported here."""

from __future__ import annotations

import argparse
from difflib import get_close_matches
from typing import NoReturn

from dials_jax.errors import InputError


class Options(argparse.ArgumentParser):
    """A parser whose errors are one line, and name the nearest option."""

    def __init__(self, command: str, description: str | None):
        super().__init__(
            prog=f"dials {command}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; dials {self.prog.split()[-1]} --help lists all options")

    def read(self, argv: list[str] | None = None) -> argparse.Namespace:
        """Parses the arguments. Raises: InputError for unknown or wrong ones."""
        given, unknown = self.parse_known_args(argv)
        # Without dashes, in which all options are alike.
        known = {text.lstrip("-") for action in self._actions for text in action.option_strings}
        for text in unknown:
            hint = "; put texts in quotes"
            if text.startswith("-"):
                close = get_close_matches(text.partition("=")[0].lstrip("-"), known, n=1)
                hint = f"; did you mean '--{close[0]}'?" if close else "; --help lists all options"
            raise InputError(f"{text!r} is no option of {self.prog}{hint}")
        return given


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The model and its policy."""
    parser.add_argument("model", metavar="MODEL", help="folder: published, converted, or a workdir")
    group = parser.add_argument_group("what is left out")
    group.add_argument("--router", default="", metavar="DIR", help="workdir of router training")
    group.add_argument("--skip-threshold", type=float, metavar="TAU", help="in place of its own")
    group.add_argument(
        "--execution-ratio", type=float, metavar="R", help="its thresholds fitted to this share"
    )
    group.add_argument(
        "--static", type=layer_numbers, default=(), metavar="I,J", help="layers, counted from 0"
    )
    group.add_argument(
        "--random", type=int, default=0, metavar="K", help="number of layers to skip, at random"
    )
    group.add_argument(
        "--cache", default="none", help="none, prefix, dual, or es-PROMPT-BLOCK, as es-64-4"
    )
    add_place_options(parser)


def add_place_options(parser: argparse.ArgumentParser) -> None:
    """The number format, the devices and the tokenizer."""
    group = parser.add_argument_group("where it runs")
    group.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: as stored")
    group.add_argument(
        "--weights", choices=("fp8", "int8"),
        help="layers and head in 8 bits, quantised as they are loaded; default: as stored",
    )  # fmt: skip
    group.add_argument(
        "--batch-invariant", action="store_true",
        help="bitwise the same answers in any batch, on Hopper GPUs and CPUs; some speed is lost",
    )  # fmt: skip
    for axis in ("data", "fsdp", "tensor"):
        group.add_argument(f"--mesh.{axis}", type=int, metavar="N", help=f"mesh: {axis} devices")
    group.add_argument("--tokenizer", default="", metavar="DIR", help="default: the model's")


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """How an answer is generated; what is not given is left to `text_sampler`."""
    group = parser.add_argument_group(
        "how answers are generated",
        "By default as the model's family is published: LLaDA and others by confidence,\n"
        "in blocks of at most 32 tokens; Dream by entropy; MDLM by ancestral sampling; SDAR and\n"
        "Fast-dLLM v2 in blocks of their own length.",
    )
    group.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="default: 256, or what there is room for"
    )
    group.add_argument("--temperature", type=float, metavar="T", help="0, the default, is greedy")
    group.add_argument("--steps", type=int, metavar="N", help="in all; default: one per token")
    group.add_argument("--block-length", type=int, metavar="N", help="tokens per block")
    group.add_argument(
        "--threshold", type=float, metavar="P", help="reveal all tokens of this confidence"
    )
    group.add_argument("--top-p", type=float, metavar="P", help="Dream, SDAR, Fast-dLLM v2")
    group.add_argument("--top-k", type=int, metavar="K", help="Dream, SDAR, Fast-dLLM v2")
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT",
        help="ends an answer, which is cut there; may be given again; a new line is $'\\n'",
    )  # fmt: skip
    group.add_argument(
        "--sampler", metavar="S", help="all settings, as 'Confidence(128, block_length=32)'"
    )
    group.add_argument("--seed", type=int, default=0)


SAMPLING = ("temperature", "steps", "block_length", "threshold", "top_p", "top_k")


def layer_numbers(text: str) -> tuple[int, ...]:
    parts = text.replace("+", ",").split(",")
    if not all(part.strip().isdecimal() and len(part) < 10 for part in parts):
        raise argparse.ArgumentTypeError(f"{text[:40]!r}: give layers from 0, as 7,9")
    return tuple(map(int, parts))
