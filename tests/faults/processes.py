"""Commands as processes of their own, to be killed, stopped, and left without room.

A command is a fork of this process, which has imported the library and computed nothing: a second
is saved each time. It ends as `dials` does, by `run_as_process`.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dials_jax.commands import run_as_process

CAPABILITY_VERSION = 0x20080522  # of capset(2)
LONGEST = 300.0  # seconds of a command that takes a few: it hangs


@dataclass
class Child:
    """A command that runs.

    Attributes:
      status: its exit status, or the negative signal that ended it; None while it runs.
    """

    pid: int
    log: Path
    began: float
    status: int | None = None

    def running(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status is None

    def wait(self) -> int:
        """Its exit status; a command that hangs is killed."""
        while self.running():
            if time.monotonic() - self.began > LONGEST:
                self.send(signal.SIGKILL)
            time.sleep(0.005)
        return self.status

    def send(self, signum: int) -> bool:
        """Whether it was still running."""
        if self.running():
            os.kill(self.pid, signum)
            return True
        return False

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Waits for a condition, or for the end of the command."""
        while self.running() and not condition():
            time.sleep(0.002)

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def last_line(self) -> str:
        return (self.text().strip().splitlines() or [""])[-1]


def start(run: Callable[[], Any], log: Path, plain_user: bool = False) -> Child:
    """Args: plain_user: permissions hold, which to root they do not."""
    sys.stdout.flush()
    sys.stderr.flush()
    # Here, not in the fork: one that a signal ends at once leaves an empty log, not the last one's.
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    pid = os.fork()
    if pid:
        os.close(output)
        return Child(pid, log, time.monotonic())
    status = 70
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        if plain_user:
            drop_capabilities()
        run_as_process(run)
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:  # what a user would see, too
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def drop_capabilities() -> None:
    """To root, too, permissions hold from now on, as to the plain owner of its files."""
    libc = ctypes.CDLL(None, use_errno=True)
    this_process, none = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)()
    if libc.capset(this_process, none):
        raise OSError(ctypes.get_errno(), "capabilities cannot be dropped")


def do(run: Callable[[], Any], log: Path) -> float:
    """Runs a command that has to succeed. Returns: its seconds."""
    child = start(run, log)
    assert child.wait() == 0, f"{log}:\n{child.text()[-3000:]}"
    return time.monotonic() - child.began


def pair(run: Callable[[], Any], logs: list[Path]) -> list[Child]:
    """Two processes that share one job of JAX."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]

    def joined(number: int) -> Callable[[], Any]:
        def work() -> Any:
            import jax

            from dials_jax.stopping import obey_sigterm

            jax.config.update("jax_cpu_collectives_implementation", "gloo")
            jax.distributed.initialize(f"localhost:{port}", 2, number)
            obey_sigterm()  # as `--distributed` does
            return run()

        return work

    return [start(joined(number), log) for number, log in enumerate(logs)]
