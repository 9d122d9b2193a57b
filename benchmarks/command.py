"""The command line that all benchmarks share: options, and one line about wrong input."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable

from benchmarks.random_model import MODELS
from dials_jax.commands import keep_programs
from dials_jax.errors import InputError

AddOptions = Callable[[argparse.ArgumentParser], None]
Run = Callable[[argparse.Namespace], int | None]  # returns the number of cases that failed


def make_main(
    name: str, doc: str | None, add_options: AddOptions, run: Run, takes_fields: bool = False
) -> Callable[[list[str] | None], int]:
    """Makes the `main` of a benchmark: it parses the command line, and returns the exit status.

    The status is 0; 1 if a case failed; 2 after one line about wrong input.

    Args:
      name: of the module in benchmarks/.
      doc: what `--help` prints first.
      takes_fields: options that are not known are fields of a configuration, in `options.fields`.
    """

    def main(arguments: list[str] | None = None) -> int:
        parser = argparse.ArgumentParser(
            prog=f"python -m benchmarks.{name}",
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_options(parser)
        if takes_fields:
            options, fields = parser.parse_known_args(arguments)
            options.fields = fields
        else:
            options = parser.parse_args(arguments)
        keep_programs()
        try:
            return min(1, run(options) or 0)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2

    return main


def add_model(
    parser: argparse.ArgumentParser, default: str = "llada_8b", names: Iterable[str] = MODELS
) -> None:
    parser.add_argument("--model", default=default, help=f"one of {', '.join(names)}")


def add_layers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, help="number of layers; default: all")


def add_layout(parser: argparse.ArgumentParser, weights: bool = True) -> None:
    """Adds how weights are held: the layout of layers, and 8 bits if `weights`."""
    choices = ["auto", "stacked", "unrolled", "fused"]
    parser.add_argument("--layout", default="auto", choices=choices)
    if weights:
        add_weights(parser)


def add_weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights", choices=["fp8", "int8"], help="layers and head in 8 bits; default: bfloat16"
    )


def add_generation(parser: argparse.ArgumentParser, gen: int = 512, block: int = 64) -> None:
    """Adds the sizes of a batch of generations."""
    parser.add_argument("--batch", type=int, default=8, help="sequences (per batch shard)")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--gen", type=int, default=gen, help="tokens to generate")
    parser.add_argument("--block", type=int, default=block, help="tokens of a block")


def add_cases(
    parser: argparse.ArgumentParser, caches: Iterable[str], policies: Iterable[str] = ("full",)
) -> None:
    """Adds the caches and the policies, of which every combination is a case."""
    parser.add_argument(
        "--caches", nargs="+", default=list(caches), help="none, prefix, dual or es-PROMPT-BLOCK"
    )
    parser.add_argument(
        "--policies", nargs="+", default=list(policies), help="full, static-N, random-N or routed-N"
    )


def add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="FILE", help="write the figures as JSON")


def add_profile(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--profile", metavar="DIR", help="trace each case to DIR, and print where its time goes"
    )
