"""What evaluations record besides their numbers: machine, versions and command."""

from __future__ import annotations

import datetime
import platform
import shlex
import sys
from typing import Any

import flax
import jax

from dials_jax.models.model import Model


def environment(model: Model, seed: int) -> dict[str, Any]:
    """Describes a run: device, mesh, versions, date, command and seed."""
    devices = model.mesh.devices
    return {
        "device": f"{devices.size} x {devices.flat[0].device_kind}",
        "mesh": ", ".join(f"{name} {size}" for name, size in model.mesh.shape.items()),
        "dtype": model.config.dtype,
        "jax": jax.__version__,
        "flax": flax.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "command": command(),
        "seed": seed,
    }


def command() -> str:
    """The command line of this process, quoted for a shell."""
    return shlex.join(["python", *sys.argv])
