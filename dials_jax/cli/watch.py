"""Plays a generation again, call by call: which token when, by which layers, at what cost.

dials watch MODEL --prompt "1 + 1 =" --router runs/router --out replay.html
dials watch MODEL --prompt "1 + 1 =" --cache es-64-4
dials watch HEAVY --light LIGHT --schedule L2,H4,L2 --max-new-tokens 8 --prompt "1 + 1 ="

A terminal shows every call beside that of full depth; elsewhere there is a line for each block. The
page of --out is one file that needs no network. [MASK] in a prompt is filled.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from dials_jax.cli.options import Options, add_model_options, add_sampling_options
from dials_jax.commands import keep_programs
from dials_jax.errors import require
from dials_jax.files import file_to_write, local_path

LONGEST_DELAY = 3600  # seconds


def watch_command(argv: list[str] | None = None) -> None:
    """Generates, plays it in the terminal and writes the page."""
    given = watch_options().read(argv)
    check_watch(given)
    keep_programs()
    from dials_jax.cli.open_model import open_model
    from dials_jax.reporting.replay_terminal import play
    from dials_jax.sampling.model_schedule import Schedule
    from dials_jax.watching import replay

    schedule = None if given.schedule is None else Schedule.parse(given.schedule)
    model, settings = open_model(given, given.chat)
    if schedule is not None:
        model, settings = take_turns(given, schedule, model, settings)
    settings |= {"chat": given.chat, "compare": not given.no_compare}
    found = replay(model, given.prompt, **settings)
    if given.out is not None:
        path = found.save(given.out)
    play(found, delay=given.delay)
    if given.out is not None:
        print(f"the page is {path}", flush=True)


def watch_options() -> Options:
    parser = Options("watch", __doc__)
    add_model_options(parser)
    group = parser.add_argument_group("a model that takes some of the steps")
    group.add_argument("--light", metavar="DIR", help="the model L; MODEL is H")
    group.add_argument("--schedule", metavar="TEXT", help="who takes which steps, as L2,H4,L2")
    group = parser.add_argument_group("prompts and the page")
    group.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="may be given again"
    )
    group.add_argument("--chat", action="store_true", help="put prompts into the chat template")
    group.add_argument("--out", metavar="HTML", help="the page, as replay.html")
    group.add_argument("--no-compare", action="store_true", help="do not run full depth as well")
    group.add_argument(
        "--delay", type=float, default=0.1, metavar="S", help="seconds between calls; default 0.1"
    )
    add_sampling_options(parser)
    return parser


def check_watch(given: argparse.Namespace) -> None:
    """Raises: InputError for options without sense, before a model is loaded."""
    require(bool(given.prompt), 'there are no prompts; give --prompt "..."')
    require(not given.stop, "--stop cuts a text, and a replay shows every call; leave it out")
    require(
        0 <= given.delay <= LONGEST_DELAY,
        f"--delay={given.delay:g} must lie in 0 to {LONGEST_DELAY} seconds",
    )
    require(
        (given.light is None) == (given.schedule is None),
        "--light is the model L of --schedule; give both, or neither",
    )
    if given.schedule:
        from dials_jax.sampling.model_schedule import Schedule

        Schedule.parse(given.schedule)
    if given.light is not None:
        local_path(given.light, "--light")
    if given.out is not None:
        file_to_write(given.out, "--out", "replay.html")


def take_turns(
    given: argparse.Namespace, schedule: Any, model: Any, settings: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both models by letter, and the settings with their schedule; the policy is H's."""
    from dials_jax.loading import load

    print(f"schedule {schedule}: H is {given.model}, L is {given.light}", file=sys.stderr)
    light = load(
        given.light, given.dtype, model.mesh, weights=given.weights,
        batch_invariant=given.batch_invariant,
    )  # fmt: skip
    models = {"H": model, "L": light}
    policy = settings["policy"] and {"H": settings["policy"]}
    return models, settings | {"policy": policy, "schedule": schedule}
