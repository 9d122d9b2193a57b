"""What `benchmarks.families` trains and measures of one size and one seed: all settings."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import jax

from benchmarks.families_claims import FAMILIES
from benchmarks.routers import text_data
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
)
from dials_jax.data.tokenizer import load_tokenizer
from dials_jax.errors import require
from dials_jax.models.families import llada_small
from dials_jax.models.groups import group_shapes
from dials_jax.training.run import step_folder

MEASURED_LAYOUT = "stacked"  # the layout where little is run: its programs compile in seconds


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

    def own_flops(self, family: str) -> float:
        """FLOPs of its own training, forward and backward; the head where there is a loss."""
        kind, options = "causal" if family == "causal" else "llada", self.options
        model = self.trainings["native"].model
        return self.own_steps(family) * step_flops(model, kind, options.batch, options.length)

    def flops(self, family: str) -> float:
        """The same with what the continued model did as a causal one."""
        before = self.half / self.steps if family == "continued" else 0.0
        return self.own_flops(family) + before * self.own_flops("causal")

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

    @property
    def most_skipped(self) -> int:
        """As many layers as Algorithm 1 may choose without neighbours, and as the paper skips."""
        return min(8, self.layers // 2)

    def sweep(self, family: str, test: TextData, calibration: TextData) -> EvalConfig:
        """The loss of the whole model, without single layers, and without Algorithm 1's."""
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
            num_static=tuple(range(1, self.most_skipped + 1)),
            allow_adjacent=(False, True),
            calibration=calibration,
            num_random=(),
            static_layers=tuple((layer,) for layer in range(self.layers)),
            batch_size=4 * options.batch,
            layout=MEASURED_LAYOUT,
            seed=self.seed,
        )

    def models(self, family: str) -> dict[str, tuple[int, Path]]:
        """By label: step of its own training, and folder."""
        folder = self.folder / family
        kept = {
            f"{family}-{step}": (step, step_folder(folder, step))
            for step in self.kept_steps(family)
        }
        return kept | {family: (self.own_steps(family), folder)}

    def study(self, family: str, test: TextData) -> RepresentationStudy:
        options = self.options
        return RepresentationStudy(
            models=tuple((label, str(path)) for label, (_, path) in self.models(family).items()),
            data=test,
            num_prompts=options.prompts,
            gen_length=options.length - options.length // 4,
            steps=options.study_steps,
            batch_size=options.batch,
            layout=MEASURED_LAYOUT,
            seed=self.seed,
        )


def chosen_families(options: argparse.Namespace) -> tuple[str, ...]:
    """Those of the options, in the order in which they can be trained."""
    return tuple(family for family in FAMILIES if family in options.families)


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
