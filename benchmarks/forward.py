"""Times one forward pass through the layers: `python -m benchmarks.forward --help`.

The head is left out, because skipping layers does not save it. Weights are random, of the true
shape, and made on the device. Every case is timed in turns with a full pass (`full_ms`).

`compile_s` is short for a program that is already in JAX's compilation cache;
JAX_ENABLE_COMPILATION_CACHE=false compiles all programs.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.command import add_layers, add_layout, add_model, add_out, make_main
from benchmarks.random_model import make_config, make_model, make_routers
from benchmarks.report import LiveTable, peak_gigabytes
from dials_jax.compiling import Timed
from dials_jax.errors import require
from dials_jax.models import transformer
from dials_jax.models.model import Model, sequence_keys
from dials_jax.skipping.flops import layer_flops
from dials_jax.skipping.policies import Static

COLUMNS = {
    "layout": "<9", "batch": ">5d", "case": "<26", "ms": ">8.2f", "full_ms": ">8.2f",
    "against_full": ">12.1%", "executed": ">8.3f", "saved_of_flops_saved": ">20.1%",
    "tflops_a_second": ">15.0f", "compile_s": ">9.1f", "peak_gb": ">7.1f",
}  # fmt: skip


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DrawnGates:
    """A policy whose gates are drawn in advance, so that only their execution is timed."""

    gates: Any  # [L, B]

    @classmethod
    def of_share(cls, share: float, num_layers: int, batch: int) -> DrawnGates:
        """Draws which layers each sequence runs, the same number for all sequences."""
        rng, count = np.random.default_rng(0), round(share * num_layers)
        gates = [rng.permutation(num_layers) < count for _ in range(batch)]
        return cls(jnp.asarray(np.stack(gates, axis=1)))

    def prepare(self, num_layers, denoising):
        return self.gates

    def gate(self, plan, h, denoising):
        return plan


def _passes(params, tokens, keys, policy, *, cfg, executor, prompt, passes):
    """Runs several passes, each of which depends on the one before; returns the last one's output.

    They are one program, as in a generation: the host starts it once.

    Returns: hidden states and gates.
    """

    def run_pass(_, carry):
        tokens = carry[0]
        out = transformer.run_layers(
            cfg,
            params,
            tokens,
            None,
            policy,
            sequence_keys=keys,
            executor=executor,
            prompt_length=prompt,
        )
        return tokens + jnp.isnan(out.h[..., 0]), out.h, out.gates.astype(bool)

    start = jax.eval_shape(lambda: run_pass(0, (tokens,)))
    start = tokens, *(jnp.zeros(x.shape, x.dtype) for x in start[1:])
    return lax.fori_loop(0, passes, run_pass, start)[1:]


class TimedPass:
    """A compiled pass that can be timed again and again."""

    def __init__(
        self, model: Model, options: argparse.Namespace, batch: int, policy: Any, executor: str
    ):
        cfg = model.config
        tokens = np.random.default_rng(0).integers(2, 500, (batch, options.tokens), dtype=np.int32)
        tokens[:, options.prompt :] = cfg.mask_id
        self._inputs = model.place_sequences((jnp.asarray(tokens), sequence_keys(None, batch)))
        self._timed = Timed(_passes, static_argnames=("cfg", "executor", "prompt", "passes"))
        self._model, self._policy = model, policy
        self._static = {
            "executor": executor, "prompt": options.prompt, "passes": options.passes,
        }  # fmt: skip
        self.executed = float(jax.device_get(self._run()[0][1]).mean())  # share of layers

    @property
    def compile_seconds(self) -> float:
        return self._timed.compile_seconds

    @property
    def memory_bytes(self) -> int:
        """Device memory of the program: weights, inputs, outputs and intermediate results."""
        model, arguments = self._model, (*self._inputs, self._policy)
        with jax.set_mesh(model.mesh):
            program = self._timed.program(
                model.inference_params, *arguments, cfg=model.config, **self._static
            )
        sizes = program.memory_analysis()
        taken = sizes.argument_size_in_bytes + sizes.output_size_in_bytes
        return taken - sizes.alias_size_in_bytes + sizes.temp_size_in_bytes

    def seconds(self) -> float:
        """Seconds of one pass."""
        return self._run()[1] / self._static["passes"]

    def _run(self) -> tuple[Any, float]:
        return self._model.run(self._timed, *self._inputs, self._policy, **self._static)


def median_in_turns(cases: list[TimedPass], repeats: int) -> list[float]:
    """The median seconds of each case. In turns, because a chip slows down while it warms up."""
    times = [[case.seconds() for case in cases] for _ in range(repeats)]
    return list(np.median(times, axis=0))


def run_batch(model: Model, options: argparse.Namespace, batch: int, table: LiveTable) -> None:
    """Times all cases of one batch size."""
    cfg = model.config
    per_sequence = "cond" if batch == 1 else "compact"
    cases = [("every layer, no gate", None, "auto")]
    for share in options.shares:
        policy = DrawnGates.of_share(share, cfg.num_layers, batch)
        cases.append((f"{per_sequence}, {share:.0%} of layers", policy, per_sequence))
    half = tuple(range(1, cfg.num_layers, 2))
    cases.append(("static, half the layers", Static(half), "auto"))
    cases.append(("routers, every layer runs", make_routers(model), per_sequence))
    cases.append(("routers, no layer runs", make_routers(model, cfg.num_layers), per_sequence))
    full = None
    for name, policy, executor in cases:
        case = TimedPass(model, options, batch, policy, executor)
        full = full or case
        base, seconds = median_in_turns([full, case], options.repeats)
        flops = batch * cfg.num_layers * case.executed * layer_flops(cfg, options.tokens)
        saved = (1 - seconds / base) / (1 - case.executed) if case.executed < 1 else None
        table.add_row(
            layout=options.layout, batch=batch, case=name, ms=1e3 * seconds, full_ms=1e3 * base,
            against_full=seconds / base - 1, executed=case.executed, saved_of_flops_saved=saved,
            tflops_a_second=flops / seconds / 1e12, compile_s=case.compile_seconds,
            peak_gb=peak_gigabytes(),
        )  # fmt: skip


def run(options: argparse.Namespace) -> None:
    cfg = make_config(options.model, options.layers)
    require(
        0 <= options.prompt < options.tokens,
        f"--prompt {options.prompt} leaves none of --tokens {options.tokens} masked, and routers "
        "would skip nothing; shorten it",
    )
    for share in options.shares:
        require(0 <= share <= 1, f"--shares {share:g}: a share lies in [0, 1]")
    table = LiveTable(COLUMNS, options.out, vars(options))
    model = make_model(cfg, options.layout, weights=options.weights)
    for batch in options.batches:
        run_batch(model, options, batch, table)


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_layers(parser)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=768, help="tokens per sequence")
    parser.add_argument("--prompt", type=int, default=256, help="of them known, at the front")
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[1.0, 0.85, 0.5, 0.25, 0.0],
        help="of layers that run, drawn for each sequence separately",
    )  # fmt: skip
    add_layout(parser)
    parser.add_argument("--passes", type=int, default=4, help="in one program, one after another")
    parser.add_argument(
        "--repeats", type=int, default=15, help="timed programs of each; the median counts"
    )
    add_out(parser)


main = make_main("forward", __doc__, add_options, run)

if __name__ == "__main__":
    sys.exit(main())
