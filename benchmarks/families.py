"""Three families from scratch on equal data, and what their layers do: Goel's claims, tested.

    python -m benchmarks.families --text data/text --tokenizer data/gpt2_bpe \\
        --workdir runs/families --out families.json
    python -m benchmarks.families_page families.json docs/results/representation.md

Of every size and seed three models of one shape (LLaDA's) are trained:

- `native`: a masked diffusion model.
- `causal`: the same blocks with a causal mask, on the next token.
- `continued`: a diffusion model that starts from the causal one half-way and trains for as long as
  that had left. As in Dream, a token is predicted at the position to its left (right shift).

So all three have seen equally many tokens of one text, the continued one first as a causal model.
Models along the way are kept. Then, for each:

- the profile of its hidden states (`RepresentationStudy`), also of the models along the way;
- the loss on held-out text with every single layer left out, and with k layers left out that
  Algorithm 1 chose, neighbours allowed or not (a sweep); exact for causal models;
- the layers that DIALS routers skip, trained on the native model.

What is done is kept in the workdir: the same command goes on where it was stopped. One size, seed
or family may run on one GPU and another on the next one, in one workdir (`--seeds 1`, `--families
native`); a command that asks for all then collects them. The continued model needs the causal one
of the same process or of an earlier one. `--plan` prints what is to be done and how long it may
take.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.command import make_main
from benchmarks.families_claims import FAMILIES
from benchmarks.families_plan import plan
from benchmarks.families_results import (
    losses_of,
    retention_of,
    skips_of,
    summarise,
    training_facts,
)
from benchmarks.families_unit import Unit, chosen_families, units
from benchmarks.report import describe_machine
from benchmarks.routers import split_documents, text_data
from dials_jax.config import (
    EvalConfig,
    RepresentationStudy,
    TextData,
    TrainConfig,
    Typed,
    from_dict,
    to_dict,
)
from dials_jax.errors import InputError, require
from dials_jax.evaluation.sweep import sweep
from dials_jax.files import read_json, write_json
from dials_jax.studies.profile import load_profiles
from dials_jax.studies.representation import run_representation
from dials_jax.training.loop import train
from dials_jax.training.optimizer import num_steps

# Not what is measured.
PLACES = ("text", "tokenizer", "workdir", "out", "stop_after", "plan", "families")


class OutOfTime(Exception):
    """The time of --stop-after is over; the same command goes on from here."""


def once(file: Path, cfg: Typed, make: Callable[[], Any]) -> Any:
    """What `make` returns. It is kept in a file, together with the settings that it is of."""
    if file.exists():
        stored = read_json(file)
        with contextlib.suppress(InputError):  # of a version with other settings
            if from_dict(type(cfg), stored["settings"]) == cfg:
                return stored["found"]
    write_json(file, {"settings": to_dict(cfg), "found": make()})
    return read_json(file)["found"]


class Runner:
    """Does the parts of all units, as long as there is time."""

    def __init__(self, options: argparse.Namespace):
        minutes = options.stop_after
        self._end = None if minutes is None else time.perf_counter() + 60 * minutes
        self._options, self._families = options, chosen_families(options)

    def _held_out(self, unit: Unit, name: str) -> TextData:
        """Of a folder of its own, since units may run in several processes."""
        options = self._options
        files = split_documents(options.text / "validation.jsonl.xz", unit.folder / "texts")
        return text_data(options, files[name])

    def _minutes_left(self) -> float | None:
        if self._end is None:
            return None
        left = (self._end - time.perf_counter()) / 60
        if left <= 0:
            raise OutOfTime
        return left

    @contextlib.contextmanager
    def while_there_is_time(self) -> Iterator[None]:
        """Ends the process when the time is over, in what stores its results as they come.

        Not by an exception, which would be lost where a callback runs, and may leave one half done.
        """

        def stop(*_: Any) -> None:
            print(OutOfTime.__doc__, flush=True)
            os._exit(1)

        left, before = self._minutes_left(), signal.signal(signal.SIGALRM, stop)
        try:
            signal.setitimer(signal.ITIMER_REAL, 60 * left if left else 0)
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def _trained(self, cfg: TrainConfig, folder: Path) -> Callable[[], dict[str, Any]]:
        def make() -> dict[str, Any]:
            print(f"{folder.parent.name}, {folder.name}:", flush=True)
            state = train(replace(cfg, max_minutes=self._minutes_left()), folder)
            if int(state.step) < num_steps(cfg.optimizer, 1):
                raise OutOfTime
            return training_facts(folder, cfg)

        return make

    def train_unit(self, unit: Unit) -> Iterator[dict[str, Any]]:
        """Trains the three models and the routers; yields the facts of each model."""
        for family in self._families:
            cfg, folder = unit.trainings[family], unit.folder / family
            facts = once(folder / "facts.json", cfg, self._trained(cfg, folder))
            own = unit.own_steps(family) * unit.step_tokens
            yield {
                **where(unit, family), **facts, "flops": unit.flops(family),
                "tokens": unit.steps * unit.step_tokens, "own_tokens": own,
            }  # fmt: skip
        if "native" in self._families:
            cfg, folder = unit.router(self._held_out(unit, "calibration")), unit.folder / "router"
            once(folder / "facts.json", cfg, self._trained(cfg, folder))

    def score_unit(self, unit: Unit) -> Iterator[dict[str, Any]]:
        """Yields each family's losses, whole and with layers left out, and routers' skips."""
        held_out = {name: self._held_out(unit, name) for name in ("test", "calibration")}
        for family in self._families:
            cfg, folder = unit.sweep(family, **held_out), unit.folder / f"sweep-{family}"

            def make(cfg: EvalConfig = cfg, folder: Path = folder) -> dict[str, Any]:
                with self.while_there_is_time():
                    results = sweep(cfg, folder)
                return losses_of(results) | retention_of(results) | skips_of(results)

            yield where(unit, family) | once(folder / "losses.json", cfg, make)

    def profile_unit(self, unit: Unit) -> Iterator[dict[str, Any]]:
        """Yields the profiles of all models of a unit, also of those along the way."""
        test = self._held_out(unit, "test")
        for family in self._families:
            cfg, folder = unit.study(family, test), unit.folder / f"study-{family}"

            def make(
                family: str = family, cfg: RepresentationStudy = cfg, folder: Path = folder
            ) -> list[dict[str, Any]]:
                with self.while_there_is_time():
                    run_representation(cfg, folder)
                models = unit.models(family)
                profiles = load_profiles(folder, list(models))
                return [
                    where(unit, family) | {"step": step} | summarise(profiles[label])
                    for label, (step, _) in models.items()
                ]

            yield from once(folder / "summary.json", cfg, make)


def where(unit: Unit, family: str) -> dict[str, Any]:
    size = f"{unit.layers}x{unit.width}"
    return {"size": size, "seed": unit.seed, "family": family}


def run(options: argparse.Namespace) -> int:
    for name in ("train.jsonl.xz", "validation.jsonl.xz"):
        file = options.text / name
        require(file.is_file(), f"{file} is missing; --text is a folder with {name}")
    require(not Path(options.out).is_dir(), f"--out {options.out} is a folder; name a file in it")
    print("\n".join(plan(options)), flush=True)
    if options.plan:
        return 0
    start, found = time.perf_counter(), units(options)
    settings = {k: x for k, x in vars(options).items() if k not in PLACES}
    results: dict[str, Any] = {"machine": describe_machine(), "settings": settings}
    results |= {"plan": list(plan(options)), "trainings": [], "losses": [], "profiles": []}
    try:
        runner = Runner(options)
        for part, unit in itertools.product(("trainings", "losses", "profiles"), found):
            method = {
                "trainings": runner.train_unit, "losses": runner.score_unit,
                "profiles": runner.profile_unit,
            }[part]  # fmt: skip
            results[part] += list(method(unit))
            print(f"{unit.name}: {part} done, {time.perf_counter() - start:.0f} s", flush=True)
    except OutOfTime:
        print(OutOfTime.__doc__)
        return 1
    if chosen_families(options) == FAMILIES:
        write_json(options.out, results)
        print(f"all in {options.out} after {time.perf_counter() - start:.0f} s")
    else:
        print(f"done with {', '.join(options.families)}; the command without --families collects")
    return 0


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--text", type=Path, required=True, help="folder of train.jsonl.xz and validation.jsonl.xz"
    )
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of GPT-2's files")
    parser.add_argument("--workdir", type=Path, required=True, help="goes on from what is there")
    parser.add_argument("--out", required=True, metavar="FILE", help="results as JSON")
    parser.add_argument("--plan", action="store_true", help="print the plan and end")
    parser.add_argument(
        "--stop-after", type=float, metavar="MINUTES",
        help="stop in order after this time, status 1; the same command goes on",
    )  # fmt: skip
    parser.add_argument("--sizes", nargs="+", default=["6x384", "12x640"], help="layers x width")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument(
        "--families", nargs="+", default=FAMILIES, choices=FAMILIES,
        help="do the parts of these alone, such as one on each GPU, and write no --out",
    )  # fmt: skip
    parser.add_argument(
        "--minutes", type=float, nargs="+", default=[1.2, 2.8],
        help="of one native training at the rates below, by size; others take as many steps",
    )  # fmt: skip
    parser.add_argument(
        "--rates",
        type=float,
        nargs="+",
        default=[1e6, 4.5e5],
        help="tokens/s expected of a native model, by size",
    )
    parser.add_argument("--steps", type=int, nargs="+", help="in place of minutes, by size")
    parser.add_argument(
        "--kept", type=float, nargs="+", default=[0.0, 0.1, 0.4],
        help="shares of a training after which models are kept and profiled",
    )  # fmt: skip
    parser.add_argument("--length", type=int, default=512, help="a quarter is the prompt")
    parser.add_argument("--batch", type=int, default=64, help="sequences of a step")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--layout", default="unrolled", choices=["stacked", "unrolled"])
    parser.add_argument("--prompts", type=int, default=64, help="of a profile")
    parser.add_argument("--study-steps", type=int, default=64, help="denoising steps of a profile")
    parser.add_argument("--items", type=int, default=128, help="test texts of the losses")
    parser.add_argument("--samples", type=int, default=16, help="masked copies of a test text")
    parser.add_argument("--router-steps", type=int, default=200)
    parser.add_argument("--skip-weight", type=float, default=1.5, help="lambda of the routers")
    parser.add_argument(
        "--execution", type=float, default=0.75, help="share of layers that routers are fitted to"
    )


main = make_main("families", __doc__, add_options, run)

if __name__ == "__main__":
    sys.exit(main())
