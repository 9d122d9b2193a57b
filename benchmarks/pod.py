"""Does a training configuration fit a TPU pod? Compiles its step for one, without having one.

python -m benchmarks.pod --config configs/mdlm/blocks_12.py --topology v5e:4x4
python -m benchmarks.pod --config configs/llada/router_gsm8k.py --topology v5e:4x4 \\
    --backbone llada_8b --length 1024 --mesh.data 1 --mesh.fsdp 16

Fields of the configuration are options, as in train.py. Nothing runs and no data or weights are
read; the compiler of the `tpu` extra (libtpu) tells what the step needs. Topologies are named as in
v5e:16x16, v5p:4x4x4 or v6e:16x16; --slices takes several of one.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import re
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from benchmarks.random_model import make_config
from benchmarks.report import Table, exit_status
from dials_jax import sharding, trees
from dials_jax.commands import load_config, override
from dials_jax.config import ModelConfig, TrainConfig
from dials_jax.data.batches import Batch
from dials_jax.errors import InputError, require
from dials_jax.keys import seed_key
from dials_jax.models import transformer
from dials_jax.training.optimizer import make_optimizer
from dials_jax.training.run import make_trainee
from dials_jax.training.step import jit_train_step, make_train_step, state_shapes

COLUMNS = {
    "topology": "<10", "chips": ">5d", "data": ">4d", "fsdp": ">4d", "tensor": ">6d",
    "batch": ">5d", "length": ">6d", "microbatches": ">12d", "kept_gb": ">7.2f",
    "peak_gb": ">7.2f", "chip_gb": ">7d", "largest_collective_gb": ">21.2f", "compile_s": ">9.1f",
}  # fmt: skip
# Memory of a chip (Google Cloud's TPU documentation); the compiler reserves a part of it.
CHIP_GB = {"TPU v5 lite": 16, "TPU v5": 95, "TPU v6 lite": 32}
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
OUT_OF_MEMORY = r"Ran out of memory.*?([\d.]+)G.*?([\d.]+)G"
COLLECTIVES = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"


class Footprint(NamedTuple):
    """The memory of a step on one device, in bytes."""

    kept: int  # between steps: parameters, optimiser, average
    peak: int
    largest_collective: int | None  # the array that it leaves on a device; None: cannot be read


def footprint(
    cfg: TrainConfig, mesh: Mesh, length: int, backbone: ModelConfig | None = None
) -> Footprint:
    """Compiles the step of a configuration for the devices of a mesh.

    Args:
      backbone: the frozen model, where routers are trained.
    """
    compiled = lower(cfg, mesh, length, backbone).compile()
    kept, peak = memory_of(compiled)
    try:
        program = compiled.as_text()
    except jax.errors.JaxRuntimeError:  # libtpu may be newer than JAX
        return Footprint(kept, peak, None)
    return Footprint(kept, peak, largest_collective(program))


def lower(
    cfg: TrainConfig, mesh: Mesh, length: int, backbone: ModelConfig | None
) -> jax.stages.Lowered:
    """The training loop's own step, of arrays that have a shape and a place only."""
    optimizer, ema = make_optimizer(cfg.optimizer, 1), cfg.optimizer.ema
    trainee, frozen = make_trainee(cfg, backbone), {}
    if backbone is not None:
        key = seed_key(cfg.seed)
        frozen = jax.eval_shape(lambda: trees.cast(transformer.init(backbone, key), backbone.dtype))
    state = state_shapes(trainee.init, optimizer, mesh, trainee.prefix, ema=ema)
    step = jit_train_step(
        make_train_step(trainee.loss_fn, optimizer, cfg.seed, cfg.num_microbatches, ema),
        state,
        mesh,
        trainee.prefix,
    )
    with jax.set_mesh(mesh):
        return step.lower(
            state,
            placed(frozen, sharding.param_shardings(frozen, mesh)),
            _batch(cfg, mesh, length, padded=backbone is not None),
        )


def placed(shapes: PyTree, shardings: PyTree) -> PyTree:
    """Arrays that have a shape and a place only."""
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, shardings
    )


def _batch(cfg: TrainConfig, mesh: Mesh, length: int, padded: bool) -> Batch:
    place = sharding.batch_sharding(mesh)

    def rows(dtype, *shape):
        return jax.ShapeDtypeStruct((cfg.batch_size, *shape), dtype, sharding=place)

    valid = rows(bool, length) if padded else None
    return Batch(rows(jnp.int32, length), rows(bool, length), valid, rows(jnp.int32))


def largest_collective(program: str) -> int:
    """Bytes of the largest array that a collective of a compiled program makes."""
    found = re.findall(rf"= (.*?) (?:{COLLECTIVES})(?:-start)?\(", program)
    arrays = [array for shapes in found for array in re.findall(r"(\w+)\[([\d,]*)\]", shapes)]
    sizes = [
        BYTES.get(dtype, 4) * int(np.prod([int(n) for n in shape.split(",") if n], dtype=np.int64))
        for dtype, shape in arrays
    ]
    return max(sizes, default=0)


def memory_of(compiled: jax.stages.Compiled) -> tuple[int, int]:
    """Bytes on one device: of the arguments, and at the peak."""
    memory = compiled.memory_analysis()
    kept = memory.argument_size_in_bytes
    return kept, getattr(memory, "peak_memory_in_bytes", 0) or kept + memory.temp_size_in_bytes


def missing_memory(error: jax.errors.JaxRuntimeError) -> str:
    """Describes the memory of a program that does not fit.

    Raises: the error, if it is about something else.
    """
    needed = re.search(OUT_OF_MEMORY, str(error))
    if not needed:
        raise error
    return f"it needs {needed[1]} GiB and has {needed[2]}"


def devices_of(topology: str, num_slices: int = 1) -> list[Any]:
    """The chips of pods, which exist only for the compiler.

    Raises: InputError without the compiler, or for a name that it does not know.
    """
    require(
        importlib.util.find_spec("libtpu") is not None,
        'the TPU compiler is missing; install it with pip install -e ".[tpu]"',
    )
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # also on machines without a TPU
    several = {"num_slices": num_slices} if num_slices > 1 else {}
    try:
        return list(topologies.get_topology_desc(topology, platform="tpu", **several).devices)
    except Exception as error:
        if "lockfile" in str(error):
            raise InputError("another process uses the TPU compiler; wait for it") from error
        raise InputError(
            f"topology {topology!r} is not known ({str(error).splitlines()[0]}); "
            "give one such as v5e:4x4 or v5p:4x4x4"
        ) from error


def compile_only() -> None:
    """Settings of a process that compiles programs but runs none."""
    jax.config.update("jax_platforms", "cpu")  # the chips belong to the compiler
    jax.config.update(
        "jax_enable_compilation_cache", False
    )  # it can store but not load these programs


def run(options: argparse.Namespace, fields: list[str]) -> None:
    cfg = override(load_config(options.config, TrainConfig), fields)
    if options.model:
        cfg = dataclasses.replace(cfg, model=make_config(options.model), backbone="")
    backbone = make_config(options.backbone) if options.backbone else None
    require(
        backbone is not None or not cfg.backbone,
        "routers are trained on a model: name its shape with --backbone, such as llada_8b",
    )
    length = options.length or getattr(cfg.data, "length", None)
    require(bool(length), "--length is missing: the rows of this data have no fixed one")
    table = Table(COLUMNS, options.out, {**vars(options), "fields": fields})
    for topology in options.topology:
        devices = devices_of(topology, options.slices)
        mesh, start = sharding.make_mesh(cfg.mesh, devices), time.perf_counter()
        facts = dict(
            topology=topology, chips=len(devices), **mesh.shape, batch=cfg.batch_size,
            length=length, microbatches=cfg.num_microbatches,
            chip_gb=CHIP_GB.get(devices[0].device_kind),
        )  # fmt: skip
        try:
            found = footprint(cfg, mesh, length, backbone)
        except jax.errors.JaxRuntimeError as error:
            missing = missing_memory(error)
            table.add(**facts, compile_s=time.perf_counter() - start)
            print(
                f"does not fit: {missing}; try --remat, more --num-microbatches, or other axes of "
                "--mesh"
            )
            continue
        largest = found.largest_collective
        table.add(
            **facts, kept_gb=found.kept / 1e9, peak_gb=found.peak / 1e9,
            largest_collective_gb=None if largest is None else largest / 1e9,
            compile_s=time.perf_counter() - start,
        )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pod",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="a configuration of train.py")
    parser.add_argument("--topology", nargs="+", default=["v5e:4x4"], help="pods to compile for")
    parser.add_argument("--slices", type=int, default=1, help="as many pods, which data spans")
    parser.add_argument(
        "--length", type=int, help="tokens per sequence, if the data has no fixed length"
    )
    parser.add_argument("--model", help="train this shape instead, from scratch: llada_8b")
    parser.add_argument("--backbone", help="the model whose routers are trained: llada_8b")
    parser.add_argument("--out", metavar="FILE", help="write the figures as JSON")
    options, fields = parser.parse_known_args(arguments)
    return exit_status(lambda: run(options, fields))


if __name__ == "__main__":
    compile_only()
    sys.exit(main())
