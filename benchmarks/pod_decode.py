"""Checks whether a generation fits TPUs, by compiling its program without TPUs.

python -m benchmarks.pod_decode --topology v5e:2x2 --tensor 4 --caches none dual --policies full

Nothing runs, and no weights are read: as in benchmarks.pod, the compiler of the `tpu` extra
(libtpu) tells what the program needs.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import jax
from jax.sharding import Mesh

from benchmarks.command import (
    add_cases,
    add_generation,
    add_layers,
    add_model,
    add_out,
    add_weights,
    make_main,
)
from benchmarks.decode import parse_policy
from benchmarks.pod import chip_gigabytes, describe_missing_memory
from benchmarks.random_model import make_config
from benchmarks.report import LiveTable
from dials_jax import sharding
from dials_jax.caching.parse import parse_cache
from dials_jax.config import MeshConfig, ModelConfig, RouterConfig
from dials_jax.nn.policy import Policy
from dials_jax.pods.footprint import read_memory
from dials_jax.pods.lowering import inference_shapes, lower_generation, routed_shapes
from dials_jax.pods.topology import Pod, only_compile, tpu_devices
from dials_jax.sampling.confidence import Confidence

COLUMNS = {
    "topology": "<10", "data": ">4d", "tensor": ">6d", "cache": "<12", "policy": "<12",
    "batch": ">5d", "kept_gb": ">7.2f", "peak_gb": ">7.2f", "chip_gb": ">7.0f",
    "compile_s": ">9.1f",
}  # fmt: skip


def abstract_policy(text: str, cfg: ModelConfig, mesh: Mesh) -> Policy | None:
    """The policy of an option; routers have a shape and a sharding only."""
    return parse_policy(
        text, cfg.num_layers, lambda _: routed_shapes(cfg, RouterConfig(), mesh, 0.1)
    )


def measure_memory(
    cfg: ModelConfig, mesh: Mesh, options: argparse.Namespace, **case: str
) -> dict[str, Any]:
    """Gigabytes of the weights and at the peak; None if the program does not fit."""
    sampler = Confidence(gen_length=options.gen, block_length=options.block)
    lowered = lower_generation(
        cfg, inference_shapes(cfg, mesh, "stacked", options.weights), mesh, sampler,
        (options.batch, options.prompt), parse_cache(case["cache"]),
        abstract_policy(case["policy"], cfg, mesh),
    )  # fmt: skip
    try:
        kept, peak = read_memory(lowered.compile())
    except jax.errors.JaxRuntimeError as error:
        missing = describe_missing_memory(error)
        print(f"does not fit: {missing}; try a larger --tensor or a smaller --batch")
        return {"kept_gb": None, "peak_gb": None}
    return {"kept_gb": kept / 1e9, "peak_gb": peak / 1e9}


def run(options: argparse.Namespace) -> None:
    cfg = make_config(options.model, options.layers)
    for cache in options.caches:
        parse_cache(cache)
    table = LiveTable(COLUMNS, options.out, vars(options))
    pod = Pod(options.topology, tpu_devices(options.topology))
    mesh = sharding.make_mesh(MeshConfig(tensor=options.tensor), pod.devices)
    for policy in options.policies:
        abstract_policy(policy, cfg, mesh)
    for cache in options.caches:
        for policy in options.policies:
            start = time.perf_counter()
            found = measure_memory(cfg, mesh, options, cache=cache, policy=policy)
            table.add_row(
                topology=options.topology, **mesh.shape, cache=cache, policy=policy,
                batch=options.batch, **found, chip_gb=chip_gigabytes(pod),
                compile_s=time.perf_counter() - start,
            )  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--topology", default="v5e:2x2", help="TPUs to compile for")
    parser.add_argument("--tensor", type=int, default=1, help="chips that share a layer")
    add_model(parser)
    add_layers(parser)
    add_generation(parser)
    add_cases(parser, caches=("none", "dual", "es-64-4"))
    add_weights(parser)
    add_out(parser)


main = make_main("pod_decode", __doc__, add_options, run)

if __name__ == "__main__":
    only_compile()
    sys.exit(main())
