"""What evaluations record besides their numbers: machine, versions, command and trainings."""

from __future__ import annotations

import contextlib
import datetime
import functools
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import flax
import jax

import dials_jax
from dials_jax.errors import InputError
from dials_jax.files import read_json
from dials_jax.models.model import Model


def environment(model: Model, seed: int) -> dict[str, Any]:
    """Describes a run: device, mesh, versions, commit, date, command and seed."""
    devices = model.mesh.devices
    return {
        "device": f"{devices.size} x {devices.flat[0].device_kind}",
        "mesh": ", ".join(f"{name} {size}" for name, size in model.mesh.shape.items()),
        "dtype": model.config.dtype,
        **({"weights": model.weights} if model.weights else {}),
        "library": library(),
        "jax": jax.__version__,
        "flax": flax.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "command": command(),
        "seed": seed,
    }


def command() -> str:
    """The command line of this process, quoted for a shell."""
    program, *arguments = sys.argv
    if program.startswith("dials "):  # as `dials_jax.cli.main` leaves it
        return f"{program} {shlex.join(arguments)}"
    return shlex.join(["python", program, *arguments])


@functools.cache
def library() -> str:
    """The version of this library, and of a checkout the commit and whether it was changed."""
    version = f"dials_jax {dials_jax.__version__}"
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():  # installed into another project's folders
        return version
    commit = _git(root, "rev-parse", "HEAD")
    changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    parts = [version, *([f"commit {commit}"] if commit else []), *(["changed"] if changed else [])]
    return ", ".join(parts)


def _git(root: Path, *arguments: str) -> str:
    """What git prints; empty if it fails or is missing."""
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def training_settings(path: str | Path) -> dict[str, Any]:
    """The settings that trained a model or routers, from the `config.json` of their workdir.

    Args:
      path: the workdir, or the folder in it that holds the result.

    Returns: {} where there is none, as for a published model.
    """
    folder = Path(path).expanduser().absolute()
    for workdir in (folder, folder.parent):
        with contextlib.suppress(InputError, OSError):
            found = read_json(workdir / "config.json").get("train")
            if isinstance(found, dict):
                return found
    return {}
