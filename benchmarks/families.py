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
- the loss on held-out text with every single layer left out (a sweep), exact for causal models;
- the layers that DIALS routers skip, trained on the native model.

What is done is kept in the workdir: the same command goes on where it was stopped. One size or seed
may run on one GPU and another on the next one, in one workdir (`--seeds 1`); a command that asks
for all then collects them. `--plan` prints what is to be done and how long it may take.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax

from benchmarks.command import make_main
from benchmarks.families_claims import FAMILIES
from benchmarks.families_results import (
    losses_of,
    skips_of,
    summarise,
    training_facts,
)
from benchmarks.report import describe_machine
from benchmarks.routers import split_documents, text_data
from benchmarks.train import step_flops
from dials_jax.config import (
    EvalConfig,
    EvalTask,
    ObjectiveConfig,
    OptimizerConfig,
    RepresentationStudy,
    RouterConfig,
    TextData,
    TrainConfig,
    Typed,
    to_dict,
)
from dials_jax.data.tokenizer import load_tokenizer
from dials_jax.errors import require
from dials_jax.evaluation.sweep import sweep
from dials_jax.files import read_json, write_json
from dials_jax.models.families import llada_small
from dials_jax.models.groups import group_shapes
from dials_jax.studies.profile import load_profiles
from dials_jax.studies.representation import run_representation
from dials_jax.training.loop import train
from dials_jax.training.optimizer import num_steps
from dials_jax.training.run import step_folder

PLACES = ("text", "tokenizer", "workdir", "out", "stop_after", "plan")  # not what is measured
FORWARD = 3.0  # a forward pass is this many times as fast as a training step
COMPILE_SECONDS = 15.0  # of a program, the first time on a machine
PROGRAMS = 10  # of a size
STORED_PER_SECOND = 0.25e9  # bytes, written or read
PREPARE_SECONDS = 60.0  # to tokenise the text once, and to start


class OutOfTime(Exception):
    """The time of `--stop-after` is over; what is done is kept."""


@dataclass(frozen=True)
class Unit:
    """The three models of one size and one seed."""

    options: argparse.Namespace
    layers: int
    width: int
    steps: int  # of the native and of the causal model
    rate: float  # tokens per second that training is expected to reach
    seed: int

    @property
    def name(self) -> str:
        return f"{self.layers}x{self.width}-{self.seed}"

    @property
    def folder(self) -> Path:
        return Path(self.options.workdir) / self.name

    @property
    def half(self) -> int:
        """Steps of the causal model before it continues as a diffusion model."""
        return self.steps // 2

    @property
    def step_tokens(self) -> int:
        return self.options.batch * self.options.length

    def own_steps(self, family: str) -> int:
        return self.steps - self.half if family == "continued" else self.steps

    def kept_steps(self, family: str) -> tuple[int, ...]:
        """The steps of a family's own training whose models are kept, without the last."""
        total = self.own_steps(family)
        return tuple(sorted({round(share * total) for share in self.options.kept} - {total}))

    @property
    def model_bytes(self) -> int:
        shapes = group_shapes(self.trainings["native"].model)
        return 4 * sum(x.size for x in jax.tree.leaves(shapes))

    def flops(self, family: str) -> float:
        """FLOPs of training, forward and backward; the head where there is a loss."""
        parts = {"native": [("llada", self.steps)], "causal": [("causal", self.steps)]}
        parts["continued"] = [("causal", self.half), ("llada", self.steps - self.half)]
        model, options = self.trainings["native"].model, self.options
        return sum(
            steps * step_flops(model, kind, options.batch, options.length)
            for kind, steps in parts[family]
        )

    # ------------------------------------------------------------------------------- settings

    @cached_property
    def trainings(self) -> dict[str, TrainConfig]:
        """How the three are trained, in the order in which they can be."""
        extra = {self.half} if self.half < self.steps else set()
        return {
            "native": self._training("native"),
            "causal": self._training("causal", extra, causal=True),
            "continued": self._training(
                "continued",
                init_from=str(step_folder(self.folder / "causal", self.half)),
                right_shift=True,
            ),
        }

    def _training(
        self, family: str, extra: set[int] = frozenset(), init_from: str = "", **changes: bool
    ) -> TrainConfig:
        options, steps = self.options, self.own_steps(family)
        ids = token_ids(options.tokenizer)
        kind = "causal" if family == "causal" else "llada"
        return TrainConfig(
            model=llada_small(self.layers, self.width, max_length=options.length, **ids, **changes),
            init_from=init_from,
            objective=ObjectiveConfig(kind=kind),
            data=replace(text_data(options, options.text / "train.jsonl.xz"), prompt_length=0),
            # A constant rate and a moving average: the models along the way are finished ones.
            optimizer=OptimizerConfig(
                learning_rate=options.learning_rate,
                b2=0.99,
                weight_decay=0.1,
                lr_schedule="constant",
                ema=0.9999,
                num_steps=steps,
                warmup_steps=max(1, steps // 15),
            ),
            batch_size=options.batch,
            layout=options.layout,
            # The continued model reads the text in another order than the causal one did.
            seed=self.seed + (1000 if family == "continued" else 0),
            log_every=20,
            save_every=steps,  # and where the time is over
            keep_checkpoints=1,
            keep_models_at=tuple(sorted({*self.kept_steps(family), *extra})),
        )

    def router(self, held_out: TextData) -> TrainConfig:
        """Routers on the native model; their thresholds are fitted to a share of the layers."""
        options, steps = self.options, self.options.router_steps
        return TrainConfig(
            backbone=str(self.folder / "native"),
            # Thresholds of hard votes may not reach the share of layers that they are fitted to.
            router=RouterConfig(d_hidden=128, votes="soft"),
            data=text_data(options, options.text / "train.jsonl.xz"),
            validation=held_out,
            validate_every=steps,
            validation_batches=2,
            fit_execution=(options.execution,),
            objective=ObjectiveConfig(skip_weight=options.skip_weight),
            optimizer=OptimizerConfig(
                learning_rate=5e-4, num_steps=steps, warmup_steps=max(1, steps // 5)
            ),
            batch_size=options.batch,
            seed=self.seed,
            log_every=10,
            save_every=steps,
            keep_checkpoints=1,
        )

    def sweep(self, family: str, test: TextData) -> EvalConfig:
        """The loss of the whole model, and with every single layer left out."""
        options, routed = self.options, family == "native"
        task = EvalTask(
            name="text", metric="nelbo", data=test, limit=options.items,
            num_samples=options.samples,
        )  # fmt: skip
        return EvalConfig(
            model=str(self.folder / family),
            routers=(str(self.folder / "router"),) if routed else (),
            execution_ratios=(options.execution,) if routed else (),
            tasks=(task,),
            num_static=(),
            num_random=(1,),
            static_layers=tuple((layer,) for layer in range(self.layers)),
            batch_size=4 * options.batch,
            seed=self.seed,
        )

    def models(self) -> dict[str, tuple[str, int, Path]]:
        """By label: family, step of its own training, and folder."""
        found = {}
        for family in FAMILIES:
            folder = self.folder / family
            for step in self.kept_steps(family):
                found[f"{family}-{step}"] = (family, step, step_folder(folder, step))
            found[family] = (family, self.own_steps(family), folder)
        return found

    def study(self, test: TextData) -> RepresentationStudy:
        options = self.options
        return RepresentationStudy(
            models=tuple((label, str(path)) for label, (_, _, path) in self.models().items()),
            adapted=("continued",),
            data=test,
            num_prompts=options.prompts,
            gen_length=options.length - options.length // 4,
            steps=options.study_steps,
            batch_size=options.batch,
            seed=self.seed,
        )

    def seconds(self) -> dict[str, float]:
        """How long its parts may take."""
        options, forward = self.options, FORWARD * self.rate
        kept = sum(len(cfg.keep_models_at) + 1 for cfg in self.trainings.values())
        # A checkpoint is of four sizes of the model; every kept model is written, and read twice.
        stored = (4 * len(FAMILIES) + 3 * kept) * self.model_bytes
        looked_at = len(self.models()) * options.prompts * options.length * options.study_steps
        scored = 2 * (self.layers + 3) * options.items * options.samples * options.length
        trained = sum(self.own_steps(family) for family in FAMILIES) * self.step_tokens
        return {
            "training": trained / self.rate,
            "storing": stored / STORED_PER_SECOND,
            "routers": options.router_steps * self.step_tokens / self.rate,
            "profiles": looked_at / forward,
            "losses": scored / forward,
        }


def token_ids(tokenizer: Path) -> dict[str, int]:
    """The ids of a model over the tokenizer's vocabulary, rounded up to a multiple of 128."""
    vocabulary = load_tokenizer(tokenizer)
    mask = vocabulary.token_to_id("[MASK]")
    ends = [vocabulary.token_to_id(name) for name in ("<|endoftext|>", "[EOS]")]
    end = next((i for i in ends if i is not None), None)
    require(
        mask is not None and end is not None,
        f"--tokenizer {tokenizer} has no [MASK] or no end of text; give GPT-2's",
    )
    size = -(-vocabulary.vocab_size // 128) * 128
    return {"vocab_size": size, "mask_id": mask, "eos_id": end, "pad_id": end}


def units(options: argparse.Namespace) -> list[Unit]:
    """All sizes and seeds. Raises: InputError for options that do not fit each other."""
    for name in ("steps" if options.steps else "minutes", "rates"):
        values = getattr(options, name)
        require(
            len(values) == len(options.sizes),
            f"--{name} has {len(values)} numbers for {len(options.sizes)} --sizes; give one per "
            "size",
        )
    require(
        all(0 <= share < 1 for share in options.kept),
        f"--kept {options.kept} must be shares of a training, in [0, 1)",
    )
    found = []
    for i, size in enumerate(options.sizes):
        parts = size.split("x")
        require(
            len(parts) == 2 and all(part.isdecimal() for part in parts),
            f"--sizes {size!r} is no size; give layers x width, such as 12x640",
        )
        layers, width = map(int, parts)
        rate, tokens = options.rates[i], options.batch * options.length
        steps = options.steps[i] if options.steps else int(60 * options.minutes[i] * rate / tokens)
        require(layers > 2, f"--sizes {size}: early and late layers need at least 3 of them")
        require(steps > 1, f"--sizes {size}: {steps} steps cannot be halved; train longer")
        found += [Unit(options, layers, width, steps, rate, seed) for seed in options.seeds]
    return found


# ----------------------------------------------------------------------------------------- plan


def plan(options: argparse.Namespace) -> Iterator[str]:
    """What is to be done, how equal budgets are, and how long it may take."""
    total = 0.0
    for unit in units(options):
        tokens = unit.steps * unit.step_tokens
        yield f"{unit.name}: {tokens:,} tokens for each family ({unit.steps:,} steps)"
        yield (
            f"  continued: {unit.half * unit.step_tokens:,} as the causal model, the rest as a "
            "diffusion model with right shift"
        )
        native = unit.flops("native")
        shares = (f"{family} {unit.flops(family) / native:.3f}" for family in FAMILIES)
        yield f"  training FLOPs, native = 1: {', '.join(shares)} ({native:.3g} FLOPs)"
        parts = unit.seconds()
        total += sum(parts.values())
        yield "  seconds: " + ", ".join(f"{name} {s:.0f}" for name, s in parts.items())
    once = PREPARE_SECONDS + COMPILE_SECONDS * PROGRAMS * len(set(options.sizes))
    yield f"in all {(total + once) / 60:.1f} minutes, {once:.0f} s of them to prepare and compile"


# ------------------------------------------------------------------------------------------ run


def once(file: Path, cfg: Typed, make: Callable[[], Any]) -> Any:
    """What `make` returns. It is kept in a file, together with the settings that it is of."""
    settings = to_dict(cfg)
    if file.exists():
        stored = read_json(file)
        if stored["settings"] == settings:
            return stored["found"]
    write_json(file, {"settings": settings, "found": make()})
    return read_json(file)["found"]


class Runner:
    """Does the parts of all units, as long as there is time."""

    def __init__(self, options: argparse.Namespace):
        minutes = options.stop_after
        self._end = None if minutes is None else time.perf_counter() + 60 * minutes
        self._options = options

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
        for family, cfg in unit.trainings.items():
            folder = unit.folder / family
            facts = once(folder / "facts.json", cfg, self._trained(cfg, folder))
            own = unit.own_steps(family) * unit.step_tokens
            yield {
                **where(unit, family), **facts, "flops": unit.flops(family),
                "tokens": unit.steps * unit.step_tokens, "own_tokens": own,
            }  # fmt: skip
        cfg, folder = unit.router(self._held_out(unit, "calibration")), unit.folder / "router"
        once(folder / "facts.json", cfg, self._trained(cfg, folder))

    def score_unit(self, unit: Unit) -> Iterator[dict[str, Any]]:
        """Yields each family's losses, whole and with one layer left out, and routers' skips."""
        test = self._held_out(unit, "test")
        for family in FAMILIES:
            cfg, folder = unit.sweep(family, test), unit.folder / f"sweep-{family}"

            def make(cfg: EvalConfig = cfg, folder: Path = folder) -> dict[str, Any]:
                self._minutes_left()
                results = sweep(cfg, folder)
                return losses_of(results) | skips_of(results)

            yield where(unit, family) | once(folder / "losses.json", cfg, make)

    def profile_unit(self, unit: Unit) -> list[dict[str, Any]]:
        """The profiles of all models of a unit, also of those along the way."""
        cfg, folder = unit.study(self._held_out(unit, "test")), unit.folder / "study"

        def make() -> list[dict[str, Any]]:
            self._minutes_left()
            run_representation(cfg, folder)
            profiles = load_profiles(folder, list(unit.models()))
            return [
                where(unit, family) | {"step": step} | summarise(profiles[label])
                for label, (family, step, _) in unit.models().items()
            ]

        return once(folder / "summary.json", cfg, make)


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
        print("the time of --stop-after is over; the same command goes on from here")
        return 1
    write_json(options.out, results)
    print(f"all in {options.out} after {time.perf_counter() - start:.0f} s")
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
        "--minutes", type=float, nargs="+", default=[1.2, 2.8],
        help="of one native or causal training at the rates below, by size",
    )  # fmt: skip
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[1e6, 4.5e5], help="tokens/s expected, by size"
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
