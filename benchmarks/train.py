"""Times training steps of a model: `python -m benchmarks.train --help`.

    python -m benchmarks.train
    python -m benchmarks.train --objective dials --model llada_8b --batch 16 --microbatches 8
    python -m benchmarks.train --batch 512 --microbatches 8 --steps 200 --save-to saves

The second one trains DIALS routers on a frozen model. The third one times the same steps with a
checkpoint that is written beside them, too, in turns: `save_percent` is what it costs of their
time, the median of the pairs, and `save_spread` half their range. A save that takes longer than the
steps is waited for, as the next one would. Tokens and weights are random. The step is
that of the training loop: loss, gradients, AdamW and the moving average. Steps are started one
after another, as in training, and the clock stops when the last one is done.

`compile_s` is short for a program that is already in JAX's compilation cache;
JAX_ENABLE_COMPILATION_CACHE=false compiles all programs.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from benchmarks.command import add_model, add_out, add_profile, make_main
from benchmarks.profile import profile_calls
from benchmarks.random_model import MODELS, make_config, make_model
from benchmarks.report import LiveTable, peak_gigabytes
from dials_jax import sharding, trees
from dials_jax.config import (
    ArithmeticData,
    MeshConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RouterConfig,
    TrainConfig,
)
from dials_jax.data.batches import Batch
from dials_jax.errors import nearest, require
from dials_jax.models import families
from dials_jax.skipping.flops import head_flops, layer_flops
from dials_jax.training.checkpoint import Checkpoints
from dials_jax.training.optimizer import make_optimizer
from dials_jax.training.run import make_trainee
from dials_jax.training.step import init_train_state, jit_train_step, make_train_step

COLUMNS = {
    "model": "<6", "objective": "<9", "blocks": ">6d", "batch": ">5d", "microbatches": ">12d",
    "unrolled": ">8", "ms": ">8.2f", "tokens_a_second": ">15,.0f", "tflops_a_second": ">15.0f",
    "compile_s": ">9.1f", "peak_gb": ">7.1f", "parameters": ">11,d", "save_percent": ">12.2f",
    "save_spread": ">11.2f",
}  # fmt: skip

ROUTERS = "dials"  # the objective of routers
GPT2_IDS = {"vocab_size": 50258, "mask_id": 50257, "eos_id": 50256, "pad_id": 50256}
TINY_IDS = {"vocab_size": 512, "mask_id": 511, "eos_id": 1, "pad_id": 0}
# Configurations by number of blocks, of the published width, as in configs/mdlm/.
FAMILIES = {
    "mdlm": families.mdlm,
    "llada": lambda blocks: families.llada_small(blocks, 768, **GPT2_IDS),
    "gpt2": lambda blocks: families.gpt2_small(blocks, 768, **GPT2_IDS),
    "tiny": lambda blocks: families.mdlm_small(blocks, 64, **TINY_IDS),  # for a laptop
}


def random_batch(cfg: ModelConfig, batch: int, length: int, seed: int = 0) -> Batch:
    """A batch of whole sequences of random tokens below [MASK]."""
    shape, rng = (batch, length), np.random.default_rng(seed)
    tokens = rng.integers(0, (cfg.mask_id or cfg.vocab_size) - 1, shape, dtype=np.int32)
    return Batch(tokens, np.ones(shape, bool), None, np.arange(batch, dtype=np.int32))


def step_flops(cfg: ModelConfig, objective: str, batch: int, length: int) -> float:
    """FLOPs of a step, forward and backward: all layers, and the head at tokens with a loss.

    Backward costs twice as much as forward, and as much where weights are frozen (`dials`).
    """
    share = 1.0 if objective == "causal" else 0.5
    forward = cfg.num_layers * layer_flops(cfg, length) + share * head_flops(cfg, length)
    return (2.0 if objective == ROUTERS else 3.0) * batch * forward


def make_case(model: str, objective: str, blocks: int | None) -> ModelConfig:
    """The model that is trained, or the frozen one of routers."""
    if objective == ROUTERS:
        return make_config(model, blocks)
    return FAMILIES[model](blocks or 12)


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """A training step; of the same names as the options."""

    objective: str = "mdlm"
    batch: int = 32
    length: int = 1024
    microbatches: int = 1
    unrolled: bool = False
    remat: bool = False
    dropout: float = 0.0
    ema: float = 0.9999

    @classmethod
    def of(cls, options: argparse.Namespace) -> StepSettings:
        return cls(
            **{field.name: getattr(options, field.name) for field in dataclasses.fields(cls)}
        )


class TimedStep:
    """A compiled training step with its state."""

    def __init__(self, cfg: ModelConfig, options: StepSettings, mesh: Mesh):
        routers = options.objective == ROUTERS
        layout = "unrolled" if options.unrolled else "stacked"
        backbone = make_model(cfg, layout, mesh=mesh) if routers else None
        self._frozen = backbone.params if routers else {}
        train = TrainConfig(
            **({"backbone": "random", "router": RouterConfig()} if routers else {"model": cfg}),
            data=ArithmeticData(),  # not read: batches are random
            optimizer=OptimizerConfig(
                learning_rate=3e-4, b2=0.999, weight_decay=0.0, lr_schedule="constant",
                num_steps=1_000_000, warmup_steps=2500,
            ),
            objective=ObjectiveConfig(**({} if routers else {"kind": options.objective})),
            batch_size=options.batch,
            num_microbatches=options.microbatches,
            dropout=options.dropout,
            remat=options.remat,
            layout=layout,
        )  # fmt: skip
        trainee, optimizer = (
            make_trainee(train, cfg if routers else None),
            make_optimizer(train.optimizer, 1),
        )
        ema = None if routers else options.ema
        self._state = init_train_state(trainee.init, optimizer, mesh, trainee.prefix, ema=ema)
        self.parameters = trees.count_parameters(self._state.params)
        self._batch = sharding.place_batch(random_batch(cfg, options.batch, options.length), mesh)
        step = make_train_step(trainee.loss_fn, optimizer, train.seed, options.microbatches, ema)
        program = jit_train_step(step, self._state, mesh, trainee.prefix)
        start = time.perf_counter()
        with jax.set_mesh(mesh):
            self.program = program.lower(self._state, self._frozen, self._batch).compile()
        self.compile_seconds = time.perf_counter() - start

    def seconds(self, steps: int, checkpoints: Checkpoints | None = None) -> float:
        """Seconds per step, with the next steps queued behind it.

        Args:
          checkpoints: get the state before the first step; the time ends when it is saved, too.
        """
        jax.block_until_ready(self._state)
        start = time.perf_counter()
        if checkpoints:
            checkpoints.save(int(self._state.step), self._state)
        for _ in range(steps):
            self._state, values = self.program(self._state, self._frozen, self._batch)
        require(
            bool(np.isfinite(values["loss"].total)),
            "the loss is not finite; the timing says nothing",
        )
        if checkpoints:
            checkpoints.wait()
        return (time.perf_counter() - start) / steps


def run(options: argparse.Namespace) -> None:
    names = MODELS if options.objective == ROUTERS else FAMILIES
    require(
        options.model in names,
        f"model {options.model!r} is not known{nearest(options.model, names)}",
    )
    require(
        min(options.steps, options.warm_up, options.repeats) > 0,
        "--steps, --warm-up and --repeats must be positive",
    )
    require(
        not options.save_to or Path(options.save_to).is_dir(),
        f"--save-to {options.save_to} is no folder; make it first",
    )
    require(
        options.batch % options.microbatches == 0,
        f"--batch {options.batch} must be divisible by --microbatches {options.microbatches}",
    )
    mesh = sharding.make_mesh(MeshConfig(fsdp=options.fsdp, tensor=options.tensor))
    table = LiveTable(COLUMNS, options.out, vars(options))
    for blocks in options.blocks:
        cfg = make_case(options.model, options.objective, blocks)
        cfg = dataclasses.replace(cfg, max_length=max(cfg.max_length, options.length))
        case = TimedStep(cfg, StepSettings.of(options), mesh)
        case.seconds(options.warm_up)
        timed, cost = time_steps(case, options)
        seconds = float(np.median(timed))
        flops = step_flops(cfg, options.objective, options.batch, options.length)
        table.add_row(
            model=options.model, objective=options.objective, blocks=cfg.num_layers,
            batch=options.batch, microbatches=options.microbatches, unrolled=options.unrolled,
            ms=1e3 * seconds,
            tokens_a_second=options.batch * options.length / seconds,
            tflops_a_second=flops / seconds / 1e12, compile_s=case.compile_seconds,
            peak_gb=peak_gigabytes(), parameters=case.parameters, **cost,
        )  # fmt: skip
        if options.profile:
            profile_steps(case, Path(options.profile) / f"{options.model}_{cfg.num_layers}")


def time_steps(
    case: TimedStep, options: argparse.Namespace
) -> tuple[list[float], dict[str, float]]:
    """Seconds per step of each repeat, and with `--save-to` what a save beside them costs."""
    if not options.save_to:
        return [case.seconds(options.steps) for _ in range(options.repeats)], {}
    plain, percent = [], []
    with tempfile.TemporaryDirectory(dir=options.save_to) as folder, Checkpoints(folder) as saves:
        case.seconds(options.warm_up, saves)
        for repeat in range(options.repeats):
            turns = (None, saves) if repeat % 2 == 0 else (saves, None)  # neither is always first
            found = {turn is not None: case.seconds(options.steps, turn) for turn in turns}
            plain.append(found[False])
            percent.append(100 * (found[True] / found[False] - 1))
    spread = (max(percent) - min(percent)) / 2
    return plain, {"save_percent": float(np.median(percent)), "save_spread": spread}


def profile_steps(case: TimedStep, folder: Path, steps: int = 3) -> None:
    def run_steps() -> int:
        case.seconds(steps)
        return steps

    profile_calls(folder, run_steps)


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model(parser, default="mdlm", names=FAMILIES)
    parser.add_argument(
        "--blocks", type=int, nargs="+", default=[None], help="default: 12; all of a frozen model"
    )
    parser.add_argument(
        "--objective", default="mdlm", choices=["llada", "mdlm", "causal", ROUTERS],
        help=f"{ROUTERS}: routers of a frozen --model, such as {', '.join(MODELS)}",
    )  # fmt: skip
    parser.add_argument(
        "--batch", type=int, default=32, help="sequences per step, over all devices"
    )
    parser.add_argument("--length", type=int, default=1024, help="tokens per sequence")
    parser.add_argument("--microbatches", type=int, default=1)
    parser.add_argument("--remat", action="store_true", help="recompute blocks: less memory")
    parser.add_argument("--dropout", type=float, default=0.0, help="published MDLMs: 0.1")
    parser.add_argument("--unrolled", action="store_true", help="own arrays for each layer")
    parser.add_argument("--ema", type=float, default=0.9999)
    parser.add_argument("--fsdp", type=int, default=1, help="devices along this axis of the mesh")
    parser.add_argument("--tensor", type=int, default=1, help="devices along this axis of the mesh")
    parser.add_argument("--steps", type=int, default=20, help="of one timing")
    parser.add_argument("--warm-up", type=int, default=3, help="steps before the first timing")
    parser.add_argument("--repeats", type=int, default=3, help="timings; the median counts")
    parser.add_argument(
        "--save-to", metavar="DIR", help="an existing folder: time steps beside a save, too"
    )
    add_profile(parser)
    add_out(parser)


main = make_main("train", __doc__, add_options, run)

if __name__ == "__main__":
    sys.exit(main())
