"""Checks whether a training configuration fits a TPU pod, by compiling its step without TPUs.

python -m benchmarks.pod --config configs/mdlm/blocks_12.py --topology v5e:4x4
python -m benchmarks.pod --config configs/llada/router_gsm8k.py --topology v5e:4x4 \\
    --backbone llada_8b --length 1024 --mesh.data 1 --mesh.fsdp 16

As `dials train --compile-for`, in a table of several topologies and for models by the name of their
shape. Fields of the configuration are options, as in train.py. Nothing runs, and no data or weights
are read; the compiler of the `tpu` extra (libtpu) tells what the step needs. Topologies have names
such as v5e:16x16, v5p:4x4x4 or v6e:16x16; --slices takes several pods of one topology.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time

import jax

from benchmarks.command import add_out, make_main
from benchmarks.random_model import make_config
from benchmarks.report import LiveTable
from dials_jax.commands import load_config, override
from dials_jax.config import TrainConfig
from dials_jax.data.sources import row_length
from dials_jax.errors import require
from dials_jax.pods.footprint import memory_that_is_missing, read_footprint
from dials_jax.pods.programs import training_programs
from dials_jax.pods.topology import Pod, only_compile, tpu_devices

COLUMNS = {
    "topology": "<10", "chips": ">5d", "data": ">4d", "fsdp": ">4d", "tensor": ">6d",
    "batch": ">5d", "length": ">6d", "microbatches": ">12d", "kept_gb": ">7.2f",
    "peak_gb": ">7.2f", "chip_gb": ">7.0f", "largest_collective_gb": ">21.2f", "compile_s": ">9.1f",
}  # fmt: skip


def describe_missing_memory(error: jax.errors.JaxRuntimeError) -> str:
    """Describes the memory of a program that does not fit.

    Raises: the error, if it is about something else.
    """
    needs, has = memory_that_is_missing(error)
    return f"it needs {needs / 1e9:.2f} GB and has {has / 1e9:.2f}"


def chip_gigabytes(pod: Pod) -> float | None:
    """As chips are called by."""
    return pod.chip and pod.chip.memory / 2**30


def run(options: argparse.Namespace) -> None:
    cfg = override(load_config(options.config, TrainConfig), options.fields)
    if options.model:
        cfg = dataclasses.replace(cfg, model=make_config(options.model), backbone="")
    backbone = make_config(options.backbone) if options.backbone else None
    require(
        backbone is not None or not cfg.backbone,
        "routers are trained on a model: name its shape with --backbone, such as llada_8b",
    )
    length = options.length or row_length(cfg.data)
    table = LiveTable(COLUMNS, options.out, vars(options))
    for topology in options.topology:
        pod = Pod(topology, tpu_devices(topology, options.slices), options.slices)
        (program,) = training_programs(cfg, pod, backbone, length)
        start = time.perf_counter()
        facts = dict(
            topology=topology, chips=len(pod.devices), **program.mesh.shape, batch=cfg.batch_size,
            length=length, microbatches=cfg.num_microbatches, chip_gb=chip_gigabytes(pod),
        )  # fmt: skip
        try:
            found = read_footprint(program.lower().compile())
        except jax.errors.JaxRuntimeError as error:
            missing = describe_missing_memory(error)
            table.add_row(**facts, compile_s=time.perf_counter() - start)
            print(f"does not fit: {missing}; dials train --compile-for tells what would help")
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
    parser.add_argument("--length", type=int, help="tokens per sequence; default: as the data says")
    parser.add_argument("--model", help="train this shape instead, from scratch: llada_8b")
    parser.add_argument("--backbone", help="the model whose routers are trained: llada_8b")
    add_out(parser)


main = make_main("pod", __doc__, add_options, run, takes_fields=True)

if __name__ == "__main__":
    only_compile()
    sys.exit(main())
