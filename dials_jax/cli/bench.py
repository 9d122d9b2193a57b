"""Times generation by a model under several policies and caches, in turns.

dials bench MODEL --policies full static=2+3 router=runs/router --caches none dual
dials bench MODEL --file prompts.jsonl --max-new-tokens 128 --json > speed.json

Without prompts they are random tokens. Before it is timed, each combination runs once, which
compiles it; then all of them run again and again in turns, each turn beginning with another one, so
that what slows the machine down slows all. On GPUs, TPUs and CPUs alike.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from dials_jax.cli.options import Options, add_place_options, add_sampling_options
from dials_jax.commands import keep_programs
from dials_jax.errors import nearest, require

POLICIES = ("full", "router", "static", "random")
BENCH_NOTE = (
    "seconds: of all prompts, without compilation: the median of {} repeats ± half their range.\n"
    "passes: model calls of a sequence. memory: of the largest program, its arguments included."
)


def bench_command(argv: list[str] | None = None) -> None:
    """Times all combinations, and prints a table, or JSON."""
    given = bench_options().read(argv)
    check_bench(given)
    texts = read_texts(given)
    keep_programs()
    from dials_jax.cli.open_model import open_bench

    bench = open_bench(given, texts)
    rows = bench.measure(given.repeats)
    if given.json:
        print(json.dumps({"environment": bench.environment, "rows": rows}, indent=1))
        return
    print(bench.table(rows).text())
    print(BENCH_NOTE.format(given.repeats))


def check_bench(given: argparse.Namespace) -> None:
    """Raises: InputError for options without sense, before a model is loaded."""
    for option, value in (("repeats", given.repeats), ("batch-size", given.batch_size)):
        require(value > 0, f"--{option}={value} must be positive")
    require(not given.stop, "--stop: answers are timed as a whole here; leave it out")
    for option, names in (("policies", given.policies), ("caches", given.caches)):
        twice = len(set(names)) < len(names)
        require(not twice, f"--{option} {' '.join(names)} names one twice; remove it")
    has_text = bool(given.prompt or given.file)
    of_random = {"num-prompts": given.num_prompts, "prompt-length": given.prompt_length}
    for option, value in of_random.items():
        alone = value is None or not has_text
        require(alone, f"--{option} is of random prompts, and prompts are given; leave it out")
        require(value is None or value > 0, f"--{option}={value} must be positive")
    require(
        has_text or not given.chat, "--chat: random prompts are no text; give --prompt or --file"
    )


def read_texts(given: argparse.Namespace) -> list[Any]:
    """The prompts that were given; none: they will be random."""
    from dials_jax.cli.generate import read_prompts

    return read_prompts(given) if given.prompt or given.file else []


def bench_options() -> Options:
    parser = Options("bench", __doc__)
    parser.add_argument("model", metavar="MODEL", help="folder: published, converted, or a workdir")
    group = parser.add_argument_group("what is compared: every policy with every cache")
    group.add_argument(
        "--policies", nargs="+", default=["full"], metavar="P",
        help="full, router=DIR, static=7+9 (layers from 0) or random=2 (how many)",
    )  # fmt: skip
    group.add_argument(
        "--caches", nargs="+", default=["none"], metavar="C",
        help="none, prefix, dual, or es-PROMPT-BLOCK, as es-64-4",
    )  # fmt: skip
    group.add_argument("--repeats", type=int, default=3, metavar="N", help="default: 3")
    group = parser.add_argument_group("prompts")
    group.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="may be given again"
    )
    group.add_argument("--file", metavar="JSONL", help="prompts, one JSON object per line")
    group.add_argument("--chat", action="store_true", help="put prompts into the chat template")
    group.add_argument("--num-prompts", type=int, metavar="N", help="of random tokens; default: 8")
    group.add_argument(
        "--prompt-length", type=int, metavar="N",
        help="of those; default: 64, or half of what the model has room for",
    )  # fmt: skip
    group.add_argument("--batch-size", type=int, default=8, metavar="N", help="default: 8")
    add_place_options(parser)
    add_sampling_options(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def parse_policy(text: str) -> dict[str, Any]:
    """`static=7+9` and others, as fields of `HarnessModel`."""
    name, _, value = text.partition("=")
    require(name in POLICIES, f"policy {text[:40]!r} is not known{nearest(name, POLICIES)}")
    if name == "full":
        require(not value, f"policy {text[:40]!r}: full has no value")
        return {}
    require(
        bool(value), f"policy {text[:40]!r}: give a value, as router=DIR, static=7+9 or random=2"
    )
    if name == "router":
        return {"router": value}
    numbers = value.split("+")
    known = all(x.isdecimal() and len(x) < 10 for x in numbers)
    if name == "random":
        known = known and len(numbers) == 1 and int(value) > 0
    require(known, f"policy {text[:40]!r}: give numbers, as static=7+9 or random=2")
    layers = tuple(map(int, numbers))
    return {"static": layers} if name == "static" else {"num_random": layers[0]}
