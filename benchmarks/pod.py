"""Checks whether a training configuration fits a TPU pod, by compiling its step without TPUs.

python -m benchmarks.pod --config configs/mdlm/blocks_12.py --topology v5e:4x4
python -m benchmarks.pod --config configs/llada/router_gsm8k.py --topology v5e:4x4 \\
    --backbone llada_8b --length 1024 --mesh.data 1 --mesh.fsdp 16

Fields of the configuration are options, as in train.py. Nothing runs, and no data or weights are
read; the compiler of the `tpu` extra (libtpu) tells what the step needs. Topologies have names such
as v5e:16x16, v5p:4x4x4 or v6e:16x16; --slices takes several pods of one topology.
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

from benchmarks.command import add_out, make_main
from benchmarks.random_model import make_config
from benchmarks.report import LiveTable
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
# Memory of a chip (Google Cloud's TPU documentation); the compiler reserves part of it.
CHIP_GB = {"TPU v5 lite": 16, "TPU v5": 95, "TPU v6 lite": 32}
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
OUT_OF_MEMORY = r"Ran out of memory.*?([\d.]+)G.*?([\d.]+)G"
COLLECTIVES = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"


class Footprint(NamedTuple):
    """The memory of a step on one device, in bytes."""

    kept: int  # between steps: parameters, optimiser, average
    peak: int
    largest_collective: int | None  # largest array that one makes; None: cannot be read


def compile_footprint(
    cfg: TrainConfig, mesh: Mesh, length: int, backbone: ModelConfig | None = None
) -> Footprint:
    """Compiles the training step for the devices of a mesh, and reads its memory.

    Args:
      backbone: the frozen model, where routers are trained.
    """
    compiled = lower_train_step(cfg, mesh, length, backbone).compile()
    kept, peak = read_memory(compiled)
    try:
        program = compiled.as_text()
    except jax.errors.JaxRuntimeError:  # libtpu may be newer than JAX
        return Footprint(kept, peak, None)
    return Footprint(kept, peak, read_largest_collective(program))


def lower_train_step(
    cfg: TrainConfig, mesh: Mesh, length: int, backbone: ModelConfig | None
) -> jax.stages.Lowered:
    """Lowers the training loop's own step, for arrays that have only a shape and a sharding."""
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
            with_shardings(frozen, sharding.param_shardings(frozen, mesh)),
            _batch(cfg, mesh, length, padded=backbone is not None),
        )


def with_shardings(shapes: PyTree, shardings: PyTree) -> PyTree:
    """Gives each abstract array its sharding."""
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, shardings
    )


def _batch(cfg: TrainConfig, mesh: Mesh, length: int, padded: bool) -> Batch:
    place = sharding.batch_sharding(mesh)

    def abstract(dtype, *shape):
        return jax.ShapeDtypeStruct((cfg.batch_size, *shape), dtype, sharding=place)

    valid = abstract(bool, length) if padded else None
    return Batch(abstract(jnp.int32, length), abstract(bool, length), valid, abstract(jnp.int32))


def read_largest_collective(program: str) -> int:
    """Bytes of the largest array that a collective of a compiled program makes, from its text."""
    found = re.findall(rf"= (.*?) (?:{COLLECTIVES})(?:-start)?\(", program)
    arrays = [array for shapes in found for array in re.findall(r"(\w+)\[([\d,]*)\]", shapes)]
    sizes = [
        BYTES.get(dtype, 4) * int(np.prod([int(n) for n in shape.split(",") if n], dtype=np.int64))
        for dtype, shape in arrays
    ]
    return max(sizes, default=0)


def read_memory(compiled: jax.stages.Compiled) -> tuple[int, int]:
    """Bytes on one device: of the arguments, and at the peak."""
    memory = compiled.memory_analysis()
    kept = memory.argument_size_in_bytes
    return kept, getattr(memory, "peak_memory_in_bytes", 0) or kept + memory.temp_size_in_bytes


def describe_missing_memory(error: jax.errors.JaxRuntimeError) -> str:
    """Describes the memory of a program that does not fit.

    Raises: the error, if it is about something else.
    """
    needed = re.search(OUT_OF_MEMORY, str(error))
    if not needed:
        raise error
    return f"it needs {needed[1]} GiB and has {needed[2]}"


def devices_of(topology: str, num_slices: int = 1) -> list[Any]:
    """The chips of a topology, described for the compiler.

    Raises: InputError if the compiler is missing, or does not know the name.
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


def only_compile() -> None:
    """Sets this process up to compile programs for TPUs, and to run none."""
    jax.config.update("jax_platforms", "cpu")  # the chips belong to the compiler
    jax.config.update(
        "jax_enable_compilation_cache", False
    )  # it can store but not load these programs


def run(options: argparse.Namespace) -> None:
    cfg = override(load_config(options.config, TrainConfig), options.fields)
    if options.model:
        cfg = dataclasses.replace(cfg, model=make_config(options.model), backbone="")
    backbone = make_config(options.backbone) if options.backbone else None
    require(
        backbone is not None or not cfg.backbone,
        "routers are trained on a model: name its shape with --backbone, such as llada_8b",
    )
    length = options.length or getattr(cfg.data, "length", None)
    require(bool(length), "--length is missing: the rows of this data have no fixed one")
    table = LiveTable(COLUMNS, options.out, vars(options))
    for topology in options.topology:
        devices = devices_of(topology, options.slices)
        mesh, start = sharding.make_mesh(cfg.mesh, devices), time.perf_counter()
        facts = dict(
            topology=topology, chips=len(devices), **mesh.shape, batch=cfg.batch_size,
            length=length, microbatches=cfg.num_microbatches,
            chip_gb=CHIP_GB.get(devices[0].device_kind),
        )  # fmt: skip
        try:
            found = compile_footprint(cfg, mesh, length, backbone)
        except jax.errors.JaxRuntimeError as error:
            missing = describe_missing_memory(error)
            table.add_row(**facts, compile_s=time.perf_counter() - start)
            print(
                f"does not fit: {missing}; try --remat, more --num-microbatches, or other axes of "
                "--mesh"
            )
            continue
        largest = found.largest_collective
        table.add_row(
            **facts, kept_gb=found.kept / 1e9, peak_gb=found.peak / 1e9,
            largest_collective_gb=None if largest is None else largest / 1e9,
            compile_s=time.perf_counter() - start,
        )  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="a configuration of train.py")
    parser.add_argument("--topology", nargs="+", default=["v5e:4x4"], help="pods to compile for")
    parser.add_argument("--slices", type=int, default=1, help="number of pods, which data spans")
    parser.add_argument(
        "--length", type=int, help="tokens per sequence, if the data has no fixed length"
    )
    parser.add_argument("--model", help="train this shape instead, from scratch: llada_8b")
    parser.add_argument("--backbone", help="the model whose routers are trained: llada_8b")
    add_out(parser)


main = make_main("pod", __doc__, add_options, run, takes_fields=True)

if __name__ == "__main__":
    only_compile()
    sys.exit(main())
