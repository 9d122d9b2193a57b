"""Executes generated programs, each in a process of its own with limits. This is no sandbox.

A program gets a temporary folder, no input, no variables of this process's environment, little
time, memory and space on disk, and no network where the kernel allows that. Starting a process,
opening a connection and writing outside the folder end it. All of this stops what models write by
mistake. It does not stop a program that means harm: it can read every file that this user can, and
Python offers ways around the checks. Where that matters, evaluate inside a container.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from dials_jax.errors import require

PASSED = "passed"
MEMORY = 1 << 30  # bytes of addresses
FILE_SIZE = 1 << 24  # bytes of each file, and of what it prints
OPEN_FILES = 64
WALL = 4  # a program may take this many times its seconds of processor time, when it waits
LONGEST_VERDICT = 1000
NOTICE = 0.05  # seconds after which a stop is noticed
# Without these a library of linear algebra starts threads, which the limit of processes forbids.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
_CHILD = Path(__file__).with_name("sample_process.py")


def execute_programs(programs: Sequence[str], seconds: int) -> list[str]:
    """Executes programs, as many at a time as there are processors.

    Args:
      seconds: of processor time for each; `WALL` times as much in all.

    Returns: for each `PASSED` if it ran to its end, or in a few words why it did not.
    """
    check_platform()
    stop = threading.Event()
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        try:
            return list(pool.map(lambda program: execute_program(program, seconds, stop), programs))
        finally:  # when this process is interrupted, too: it waits for what runs no longer
            stop.set()


def check_platform() -> None:
    """Raises: InputError on systems that cannot limit a process."""
    require(
        find_spec("resource") is not None,
        "code is executed on Linux and macOS only, where a process can be limited; run there",
    )


def execute_program(program: str, seconds: int, stop: threading.Event | None = None) -> str:
    """One of `execute_programs`. Nothing of it is left: no process, no file.

    Args:
      stop: once it is set, the program is ended.
    """
    token = secrets.token_hex(8)  # who does not know it cannot say that a program passed
    request = {"program": program, "token": token, "limits": limits(seconds)}
    with (
        tempfile.TemporaryDirectory(prefix="dials-code-") as folder,
        tempfile.TemporaryFile() as asked,
        tempfile.TemporaryFile() as answer,  # a file, since its size is limited
    ):
        asked.write(json.dumps(request).encode())
        asked.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", "-X", "utf8", str(_CHILD), folder],
            stdin=asked,
            stdout=answer,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=ENVIRONMENT | {"HOME": folder, "TMPDIR": folder},
            start_new_session=True,
        )
        ended = _wait(process, WALL * seconds, stop or threading.Event())
        answer.seek(0)
        said = answer.read(LONGEST_VERDICT).decode(errors="replace")
    if said.startswith(token + " "):
        return said.removeprefix(token + " ")
    return _why(process.returncode) if ended else f"takes more than {WALL * seconds} s"


def limits(seconds: int) -> dict[str, int]:
    """By the names of `resource`."""
    return {
        "RLIMIT_CPU": seconds,
        "RLIMIT_AS": MEMORY,
        "RLIMIT_FSIZE": FILE_SIZE,
        "RLIMIT_NOFILE": OPEN_FILES,
        "RLIMIT_NPROC": 0,  # the kernel does not hold root to this one
        "RLIMIT_CORE": 0,
    }


def _wait(process: subprocess.Popen, seconds: int | float, stop: threading.Event) -> bool:
    """Waits for the end, at most so long, and kills the group. Returns: whether it ended itself."""
    deadline = time.monotonic() + seconds
    try:
        while not stop.is_set() and (left := deadline - time.monotonic()) > 0:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(min(left, NOTICE))
                return True
        return False
    finally:  # also when this process is interrupted
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _why(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code} before its tests"
    name = signal.Signals(-code).name
    return "takes too much processor time" if name in ("SIGXCPU", "SIGKILL") else f"ended by {name}"
