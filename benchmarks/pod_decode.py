"""Does a generation fit TPUs? Compiles its program for some, without having one.

python -m benchmarks.pod_decode --topology v5e:2x2 --tensor 4 --caches none dual --policies full

Nothing runs and no weights are read: as in benchmarks.pod, the compiler of the `tpu` extra (libtpu)
says what the program takes.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from benchmarks.decode import add_shapes, parse_policy
from benchmarks.pod import (
    CHIP_GB,
    compile_only,
    devices_of,
    memory_of,
    missing_memory,
    placed,
)
from benchmarks.random_model import make_config
from benchmarks.report import Table, exit_status
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


def lower(
    cfg: ModelConfig,
    mesh: Mesh,
    sampler: Confidence,
    shape: tuple[int, int],
    cache: str,
    policy: str,
) -> jax.stages.Lowered:
    """The program of `generate`, of arrays that have only a shape and a sharding.

    Args:
      shape: sequences, and tokens per prompt; padded on the left.
    """

    def make():
        return transformer.prepare_for_inference(
            cfg, trees.cast(transformer.init(cfg, seed_key(0)), cfg.dtype)
        )

    params = jax.eval_shape(make)
    params = placed(params, sharding.param_shardings(params, mesh))
    place = sharding.batch_sharding(mesh)

    def batch_of(dtype, *rest):
        return jax.ShapeDtypeStruct((shape[0], *rest), dtype, sharding=place)

    keys = batch_of(jax.eval_shape(lambda: seed_key(0)).dtype)
    # The abstract mesh: constants are computed on this machine, not on chips that do not exist.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return generate_program.lower(
            params, batch_of(jnp.int32, shape[1]), batch_of(bool, shape[1]), keys,
            _policy(policy, cfg, mesh),
            cfg=cfg, sampler=sampler, cache=parse_cache(cache) or NoCache(), executor="auto",
        )  # fmt: skip


def _policy(text: str, cfg: ModelConfig, mesh: Mesh) -> Policy | None:
    def make():
        size = cfg.d_model, cfg.num_layers
        return rounded(init_routers(*size, RouterConfig(), seed_key(0)), cfg.dtype)

    def routed(num_skipped):
        shapes, everywhere = jax.eval_shape(make), sharding.replicated(mesh)
        return Routed(placed(shapes, jax.tree.map(lambda _: everywhere, shapes)), 0.1)

    return parse_policy(text, cfg.num_layers, routed)


def measure(
    cfg: ModelConfig, mesh: Mesh, options: argparse.Namespace, **case: str
) -> dict[str, Any]:
    """Bytes of the weights and of the peak; None where the program does not fit."""
    sampler = Confidence(gen_length=options.gen, block_length=options.block)
    lowered = lower(cfg, mesh, sampler, (options.batch, options.prompt), **case)
    try:
        kept, peak = memory_of(lowered.compile())
    except jax.errors.JaxRuntimeError as error:
        print(f"does not fit: {missing_memory(error)}; try a larger --tensor or a smaller --batch")
        return {"kept_gb": None, "peak_gb": None}
    return {"kept_gb": kept / 1e9, "peak_gb": peak / 1e9}


def run(options: argparse.Namespace) -> None:
    cfg = make_config(options.model, options.layers)
    for cache in options.caches:
        parse_cache(cache)
    table = Table(COLUMNS, options.out, vars(options))
    devices = devices_of(options.topology)
    mesh = sharding.make_mesh(MeshConfig(tensor=options.tensor), devices)
    for policy in options.policies:
        _policy(policy, cfg, mesh)
    for cache in options.caches:
        for policy in options.policies:
            start = time.perf_counter()
            found = measure(cfg, mesh, options, cache=cache, policy=policy)
            table.add(
                topology=options.topology, **mesh.shape, cache=cache, policy=policy,
                batch=options.batch, **found, chip_gb=CHIP_GB.get(devices[0].device_kind),
                compile_s=time.perf_counter() - start,
            )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pod_decode",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--topology", default="v5e:2x2", help="TPUs to compile for")
    parser.add_argument("--tensor", type=int, default=1, help="chips that share a layer")
    add_shapes(parser)
    parser.add_argument("--caches", nargs="+", default=["none", "dual", "es-64-4"])
    parser.add_argument(
        "--policies", nargs="+", default=["full"], help="full, static-N, random-N or routed-N"
    )
    parser.add_argument("--out", metavar="FILE", help="write the figures as JSON")
    options = parser.parse_args(arguments)
    return exit_status(lambda: run(options))


if __name__ == "__main__":
    compile_only()
    sys.exit(main())
