"""The devices of a pod that need not be here: a compiler's descriptions of them.

`v5e:16x16` is a TPU slice, `2xv5e:16x16` two of them, `cpu:8` eight fake devices of this machine.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from dials_jax.errors import InputError, require
from dials_jax.estimates import device_memory

EXAMPLES = "v5e:4x4, v5p:4x4x4, 2xv6e:16x16 or cpu:8"
MAX_CPU_DEVICES = 1024
GIB = 2.0**30
CHIPS_OF_HOST = 4


class Chip(NamedTuple):
    """What a kind of device has.

    Attributes:
      memory: bytes; the compiler reserves part of it.
      flops: a second, of matmuls of bfloat16.
      bandwidth: bytes a second, between the chip and its memory.
      network: bytes a second that leave the chip along one axis of the network, both ways together.
    """

    memory: float
    flops: float
    bandwidth: float
    network: float


# Google Cloud's documentation of each generation. Of the bandwidth that it gives for all links of a
# chip together, in bits, one axis of the network has its part: a half in two dimensions, a third in
# three.
CHIPS = {
    "TPU v4": Chip(32 * GIB, 275e12, 1228e9, 2400e9 / 8 / 3),
    "TPU v5 lite": Chip(16 * GIB, 197e12, 819e9, 1600e9 / 8 / 2),
    "TPU v5": Chip(95 * GIB, 459e12, 2765e9, 4800e9 / 8 / 3),
    "TPU v6 lite": Chip(32 * GIB, 918e12, 1640e9, 3584e9 / 8 / 2),
}


@dataclass(frozen=True)
class Pod:
    """Devices to compile for.

    Attributes:
      devices: as the compiler describes them; nothing runs on them.
      num_slices: parts with a slower network between them, which `data` spans.
      chip: None where nothing is known about it.
    """

    name: str
    devices: Sequence[Any]
    num_slices: int = 1

    @property
    def chip(self) -> Chip | None:
        return CHIPS.get(self.devices[0].device_kind)

    @property
    def memory(self) -> int | float | None:
        """Bytes of a device; of a fake one its share of this machine's."""
        return device_memory() if self.chip is None else self.chip.memory


def only_compile() -> None:
    """Sets this process up to compile programs for other devices, and to run none.

    Call it before anything is computed.
    """
    jax.config.update("jax_platforms", "cpu")  # the chips belong to the compiler
    # It can store programs for them, but not load them.
    jax.config.update("jax_enable_compilation_cache", False)


def find_pod(name: str) -> Pod:
    """The devices that a name such as `v5e:16x16` stands for.

    Raises: InputError for another name, and if the compiler for TPUs is missing.
    """
    found = re.fullmatch(r"(?:([1-9]\d{0,3})x)?(\w+):([\dx]+)", name)
    require(found is not None, f"--compile-for={name!r} is no pod; give one such as {EXAMPLES}")
    slices, kind, shape = int(found[1] or 1), found[2], found[3]
    if kind != "cpu":
        return Pod(name, tpu_devices(f"{kind}:{shape}", slices), slices)
    require(
        slices == 1 and shape.isdigit() and 0 < int(shape) <= MAX_CPU_DEVICES,
        f"--compile-for={name!r}: of fake devices give a number up to {MAX_CPU_DEVICES}, as cpu:8",
    )
    return Pod(name, cpu_devices(int(shape)))


def cpu_devices(count: int) -> list[Any]:
    """Fake devices of this machine. Raises: InputError if JAX has started with fewer."""
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # it has started
        pass
    devices = jax.devices("cpu")
    require(
        len(devices) >= count,
        f"cpu:{count}: JAX has started with {len(devices)} devices; ask for them in a new process",
    )
    return devices[:count]


def tpu_devices(topology: str, num_slices: int = 1) -> list[Any]:
    """The chips of a topology, described for the compiler.

    Raises: InputError if the compiler is missing, or does not know the name.
    """
    require(
        importlib.util.find_spec("libtpu") is not None,
        "the TPU compiler is missing; install it with pip install 'dials_jax[tpu]'",
    )
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # also on machines without a TPU
    how = {"num_slices": num_slices} if num_slices > 1 else _bounds_of_part(topology)
    try:
        return list(topologies.get_topology_desc(topology, platform="tpu", **how).devices)
    except Exception as error:
        if "lockfile" in str(error):
            raise InputError("another process uses the TPU compiler; wait for it") from error
        raise InputError(
            f"topology {topology!r} is not known ({str(error).splitlines()[0]}); "
            f"give one such as {EXAMPLES}"
        ) from error


def _bounds_of_part(topology: str) -> dict[str, tuple[int, ...]]:
    """What the compiler has to be told of a part of a host, as v5e:1x2: it expects four chips."""
    sizes = topology.partition(":")[2].split("x")
    if not all(map(str.isdecimal, sizes)) or math.prod(map(int, sizes)) >= CHIPS_OF_HOST:
        return {}
    return {"chips_per_host_bounds": (*map(int, sizes), 1, 1)[:3]}
