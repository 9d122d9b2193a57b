"""What routers add to a model (DIALS, Table 2): `python -m benchmarks.router_overhead --help`.

Prints parameters, memory, latency per layer, and FLOPs per prompt, of the model and of its routers
while they skip nothing. Weights are random, of the true shape, and made on the device. Memory is
that of the compiled program of a pass: weights, inputs and intermediate results.

FLOPs per prompt are those of all passes that generate an answer, for the model and for the routers.
The paper's 120 GFLOPs against 4,200 TFLOPs fit one pass of the routers (32 x 512 x 4,098 x 2 FLOPs
for each of about 890 tokens) against 256 passes of the model; pass for pass that is 0.7 %.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from benchmarks.command import add_layers, add_layout, add_model, add_out, make_main
from benchmarks.forward import TimedPass, median_in_turns
from benchmarks.random_model import make_config, make_model, make_routers
from benchmarks.report import LiveTable
from dials_jax import trees
from dials_jax.config import ModelConfig
from dials_jax.errors import require
from dials_jax.skipping.flops import head_flops, layer_flops
from dials_jax.skipping.routed import Routed

COLUMNS = {"metric": "<22", "baseline": ">14", "routers": ">14", "increase": ">9.3%"}


def run(options: argparse.Namespace) -> None:
    cfg = make_config(options.model, options.layers)
    require(
        0 <= options.prompt < options.tokens,
        f"--prompt {options.prompt} leaves none of --tokens {options.tokens} to generate",
    )
    table = LiveTable(COLUMNS, options.out, vars(options))
    model = make_model(cfg, options.layout, weights=options.weights)
    routers = make_routers(model, d_hidden=options.d_hidden)

    def add(metric: str, unit: str, scale: float, baseline: float, added: float) -> None:
        table.add_row(
            metric=metric, baseline=f"{baseline / scale:,.4g} {unit}",
            routers=f"{added / scale:,.4g} {unit}", increase=added / baseline,
            baseline_value=baseline, routers_value=added,
        )  # fmt: skip

    counts = [trees.count_parameters(params) for params in (model.params, routers.router)]
    add("parameters", "M", 1e6, *counts)
    executor = "cond" if options.batch == 1 else "compact"
    passes = [
        TimedPass(model, options, options.batch, policy, executor) for policy in (None, routers)
    ]
    memory = [one.memory_bytes for one in passes]
    add("memory", "GB", 1e9, memory[0], memory[1] - memory[0])
    seconds = median_in_turns(passes, options.repeats)
    per_layer = [1e3 * value / cfg.num_layers for value in seconds]
    add("latency per layer", "ms", 1, per_layer[0], per_layer[1] - per_layer[0])
    add("FLOPs per prompt", "TFLOPs", 1e12, *_flops_per_prompt(cfg, routers, options))


def _flops_per_prompt(
    cfg: ModelConfig, routers: Routed, options: argparse.Namespace
) -> tuple[Any, Any]:
    """FLOPs of the model and of the routers while one answer is generated, without a cache."""
    generated = options.tokens - options.prompt
    steps = options.steps or generated
    model = cfg.num_layers * layer_flops(cfg, options.tokens) + head_flops(cfg, generated)
    return steps * model, steps * cfg.num_layers * routers.flops(cfg, generated)


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_layers(parser)
    parser.add_argument("--batch", type=int, default=1, help="sequences of the timed pass")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens per sequence")
    parser.add_argument("--prompt", type=int, default=768, help="of them known, at the front")
    parser.add_argument("--steps", type=int, help="passes per prompt; default: one per token")
    parser.add_argument("--d-hidden", type=int, default=512, help="width of the routers")
    add_layout(parser)
    parser.add_argument("--passes", type=int, default=4, help="in one program, one after another")
    parser.add_argument("--repeats", type=int, default=15, help="timed programs; the median counts")
    add_out(parser)


main = make_main("router_overhead", __doc__, add_options, run)

if __name__ == "__main__":
    sys.exit(main())
