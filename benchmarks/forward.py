"""One forward pass through the layers, timed: `python -m benchmarks.forward --help`.

The head is left out: what is compared is what skipping can save. Weights are random, of the true
shape and made on the device.

`compile_s` is short for a program that an earlier run has left in JAX's compilation cache;
JAX_ENABLE_COMPILATION_CACHE=false compiles all of them.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.random_model import MODELS, make_config, make_model, make_routers
from benchmarks.report import Table, exit_status, peak_gigabytes
from dials_jax.models import transformer
from dials_jax.models.model import Model, row_keys
from dials_jax.skipping.flops import layer_flops
from dials_jax.skipping.policies import Static
from dials_jax.timing import Timed

COLUMNS = {
    "layout": "<9", "batch": ">5d", "case": "<26", "ms": ">8.2f", "against_full": ">12.1%",
    "executed": ">8.3f", "saved_of_flops_saved": ">20.1%", "tflops_a_second": ">15.0f",
    "compile_s": ">9.1f", "peak_gb": ">7.1f",
}  # fmt: skip


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Drawn:
    """Gates drawn beforehand: what is timed is how they are carried out."""

    gates: Any  # [L, B]

    @classmethod
    def of_share(cls, share: float, num_layers: int, batch: int) -> Drawn:
        """Random layers for each row, equally many in all of them."""
        rng, count = np.random.default_rng(0), round(share * num_layers)
        rows = [rng.permutation(num_layers) < count for _ in range(batch)]
        return cls(jnp.asarray(np.stack(rows, axis=1)))

    def plan(self, num_layers, denoising):
        return self.gates

    def gate(self, plan, h, denoising):
        return plan


def _layers(params, tokens, keys, policy, *, cfg, executor, prompt):
    out = transformer.run_layers(
        cfg, params, tokens, None, policy, row_keys=keys, executor=executor, vote_from=prompt
    )
    return out.h, out.gates


def measure(model: Model, options: argparse.Namespace, batch: int, policy: Any, executor: str):
    """Median seconds of a pass, the share of layers that ran, and seconds of compilation."""
    cfg = model.config
    tokens = np.random.default_rng(0).integers(2, 500, (batch, options.tokens), dtype=np.int32)
    tokens[:, options.prompt :] = cfg.mask_id
    rows = model.place_rows((jnp.asarray(tokens), row_keys(None, batch)))
    timed = Timed(_layers, static_argnames=("cfg", "executor", "prompt"))

    def run():
        (_, gates), seconds = model.run(
            timed, *rows, policy, executor=executor, prompt=options.prompt
        )
        return seconds, gates

    gates = jax.device_get(run()[1])
    seconds = sorted(run()[0] for _ in range(options.repeats))[options.repeats // 2]
    return seconds, float(gates.mean()), timed.compile_seconds


def run_batch(model: Model, options: argparse.Namespace, batch: int, table: Table) -> None:
    cfg = model.config
    per_row = "cond" if batch == 1 else "compact"
    cases = [("every layer, no gate", None, "auto")]
    for share in options.shares:
        policy = Drawn.of_share(share, cfg.num_layers, batch)
        cases.append((f"{per_row}, {share:.0%} of layers", policy, per_row))
    half = tuple(range(1, cfg.num_layers, 2))
    cases.append(("static, half the layers", Static(half), "auto"))
    cases.append(("routers, every layer runs", make_routers(model), per_row))
    cases.append(("routers, no layer runs", make_routers(model, cfg.num_layers), per_row))
    full = None
    for name, policy, executor in cases:
        seconds, executed, compiled = measure(model, options, batch, policy, executor)
        full = full or seconds
        flops = batch * cfg.num_layers * executed * layer_flops(cfg, options.tokens)
        saved = (1 - seconds / full) / (1 - executed) if executed < 1 else None
        table.add(
            layout=options.layout, batch=batch, case=name, ms=1e3 * seconds,
            against_full=seconds / full - 1, executed=executed, saved_of_flops_saved=saved,
            tflops_a_second=flops / seconds / 1e12, compile_s=compiled, peak_gb=peak_gigabytes(),
        )  # fmt: skip


def run(options: argparse.Namespace) -> None:
    cfg = make_config(options.model, options.layers)
    table = Table(COLUMNS, options.out, vars(options))
    model = make_model(cfg, options.layout)
    for batch in options.batches:
        run_batch(model, options, batch, table)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.forward", description=__doc__)
    parser.add_argument("--model", default="llada_8b", help=f"one of {', '.join(MODELS)}")
    parser.add_argument("--layers", type=int, help="only so many layers; default: all")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=768, help="tokens of a row")
    parser.add_argument("--prompt", type=int, default=256, help="of them known, at the front")
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[1.0, 0.85, 0.5, 0.25, 0.0],
        help="of layers that run, drawn for each row by itself",
    )  # fmt: skip
    parser.add_argument(
        "--layout", default="auto", choices=["auto", "stacked", "unrolled", "fused"]
    )
    parser.add_argument("--repeats", type=int, default=15, help="timed passes; the median counts")
    parser.add_argument("--out", metavar="FILE", help="write the figures as JSON")
    options = parser.parse_args(arguments)
    return exit_status(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
