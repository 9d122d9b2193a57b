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
import jax.numpy as jnp
from jax.sharding import Mesh

from benchmarks.command import (
    add_cases,
    add_generation,
    add_layers,
    add_model,
    add_out,
    make_main,
)
from benchmarks.decode import parse_policy
from benchmarks.pod import (
    CHIP_GB,
    describe_missing_memory,
    devices_of,
    only_compile,
    read_memory,
    with_shardings,
)
from benchmarks.random_model import make_config
from benchmarks.report import LiveTable
from dials_jax import sharding, trees
from dials_jax.caching.parse import parse_cache
from dials_jax.caching.plain import NoCache
from dials_jax.config import MeshConfig, ModelConfig, RouterConfig
from dials_jax.keys import seed_key
from dials_jax.models import transformer
from dials_jax.nn.policy import Policy
from dials_jax.sampling.confidence import Confidence
from dials_jax.sampling.generate import generate_program
from dials_jax.skipping.routed import Routed, init_routers, rounded

COLUMNS = {
    "topology": "<10", "data": ">4d", "tensor": ">6d", "cache": "<12", "policy": "<12",
    "batch": ">5d", "kept_gb": ">7.2f", "peak_gb": ">7.2f", "chip_gb": ">7d", "compile_s": ">9.1f",
}  # fmt: skip


def lower_generation(
    cfg: ModelConfig,
    mesh: Mesh,
    sampler: Confidence,
    shape: tuple[int, int],
    cache: str,
    policy: str,
) -> jax.stages.Lowered:
    """Lowers the program of `generate`, for arrays that have only a shape and a sharding.

    Args:
      shape: number of sequences, and tokens per prompt, which is padded on the left.
    """

    def init_params():
        return transformer.prepare_for_inference(
            cfg, trees.cast(transformer.init(cfg, seed_key(0)), cfg.dtype)
        )

    params = jax.eval_shape(init_params)
    params = with_shardings(params, sharding.param_shardings(params, mesh))
    place = sharding.batch_sharding(mesh)

    def abstract(dtype, *rest):
        return jax.ShapeDtypeStruct((shape[0], *rest), dtype, sharding=place)

    keys = abstract(jax.eval_shape(lambda: seed_key(0)).dtype)
    # The abstract mesh: constants are computed on this machine, not on chips that do not exist.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return generate_program.lower(
            params, abstract(jnp.int32, shape[1]), abstract(bool, shape[1]), keys,
            _abstract_policy(policy, cfg, mesh),
            cfg=cfg, sampler=sampler, cache=parse_cache(cache) or NoCache(), executor="auto",
        )  # fmt: skip


def _abstract_policy(text: str, cfg: ModelConfig, mesh: Mesh) -> Policy | None:
    def make():
        size = cfg.d_model, cfg.num_layers
        return rounded(init_routers(*size, RouterConfig(), seed_key(0)), cfg.dtype)

    def routed(num_skipped):
        shapes, everywhere = jax.eval_shape(make), sharding.replicated(mesh)
        return Routed(with_shardings(shapes, jax.tree.map(lambda _: everywhere, shapes)), 0.1)

    return parse_policy(text, cfg.num_layers, routed)


def measure_memory(
    cfg: ModelConfig, mesh: Mesh, options: argparse.Namespace, **case: str
) -> dict[str, Any]:
    """Gigabytes of the weights and at the peak; None if the program does not fit."""
    sampler = Confidence(gen_length=options.gen, block_length=options.block)
    lowered = lower_generation(cfg, mesh, sampler, (options.batch, options.prompt), **case)
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
    devices = devices_of(options.topology)
    mesh = sharding.make_mesh(MeshConfig(tensor=options.tensor), devices)
    for policy in options.policies:
        _abstract_policy(policy, cfg, mesh)
    for cache in options.caches:
        for policy in options.policies:
            start = time.perf_counter()
            found = measure_memory(cfg, mesh, options, cache=cache, policy=policy)
            table.add_row(
                topology=options.topology, **mesh.shape, cache=cache, policy=policy,
                batch=options.batch, **found, chip_gb=CHIP_GB.get(devices[0].device_kind),
                compile_s=time.perf_counter() - start,
            )  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--topology", default="v5e:2x2", help="TPUs to compile for")
    parser.add_argument("--tensor", type=int, default=1, help="chips that share a layer")
    add_model(parser)
    add_layers(parser)
    add_generation(parser)
    add_cases(parser, caches=("none", "dual", "es-64-4"))
    add_out(parser)


main = make_main("pod_decode", __doc__, add_options, run)

if __name__ == "__main__":
    only_compile()
    sys.exit(main())
