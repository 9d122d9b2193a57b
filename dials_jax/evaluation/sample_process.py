"""The process in which `run_code` executes one program. It imports the standard library alone.

It is started as `python -I sample_process.py FOLDER`, reads a request from its input and writes to
its output `TOKEN VERDICT`. The verdict is "passed" if the program ran to its end, else why not.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
from collections.abc import Callable

# Raised by Python before it acts (`sys.audit`). A program that starts a process or opens a
# connection ends at once, whatever it catches; so does one that writes outside its folder.
FORBIDDEN = {
    "os.exec", "os.fork", "os.forkpty", "os.kill", "os.killpg", "os.posix_spawn", "os.spawn",
    "os.system", "pty.spawn", "socket.__new__", "subprocess.Popen",
}  # fmt: skip
CHANGING = {
    "os.chflags", "os.chmod", "os.chown", "os.link", "os.mkdir", "os.remove", "os.removexattr",
    "os.rename", "os.rmdir", "os.setxattr", "os.symlink", "os.truncate", "os.utime",
    "shutil.rmtree", "sqlite3.connect",
}  # fmt: skip
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CLONE_NEWUSER, CLONE_NEWNET, PR_SET_PDEATHSIG = 0x10000000, 0x40000000, 1


def execute_request(folder: str) -> None:
    request = json.loads(sys.stdin.buffer.read())
    result, write, leave = os.dup(1), os.write, os._exit  # a program may replace them in `os`

    def finish(verdict: str) -> None:
        write(result, f"{request['token']} {verdict}".encode(errors="replace"))
        leave(0)

    _redirect(folder)
    _leave_network()
    set_limits(request["limits"])
    sys.addaudithook(_watch(os.path.realpath(folder), finish))
    try:
        exec(compile(request["program"], "program.py", "exec"), {})
    except BaseException as error:  # SystemExit too: the tests have not run
        finish(f"{type(error).__name__}: {error}".strip(": ")[:200])
    finish("passed")


def _redirect(folder: str) -> None:
    """Empty input; both outputs into a file of the folder, so that its limit holds for them."""
    os.chdir(folder)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)


def _leave_network() -> None:
    """On Linux: a network of its own, which is empty, where the kernel allows that; and the end of
    this process with that of its parent."""
    if sys.platform != "linux":
        return
    import ctypes

    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if libc.unshare(CLONE_NEWNET) != 0:  # needs a privilege, or users of its own
        libc.unshare(CLONE_NEWUSER | CLONE_NEWNET)


def set_limits(limits: dict[str, int]) -> None:
    """Args: limits: numbers by the names of `resource`; a limit that is lower already stays."""
    for name, number in limits.items():
        kind = getattr(resource, name)
        _, most = resource.getrlimit(kind)
        number = number if most == resource.RLIM_INFINITY else min(number, most)
        with contextlib.suppress(ValueError, OSError):  # macOS limits no addresses
            resource.setrlimit(kind, (number, number))


def _watch(folder: str, finish: Callable[[str], None]) -> Callable[[str, tuple], None]:
    real, decode, within = os.path.realpath, os.fsdecode, folder + os.sep

    def outside(path: object) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False  # a file that is open already, or no path
        path = real(decode(path))
        return path != os.devnull and not f"{path}{os.sep}".startswith(within)

    def watch(event: str, args: tuple) -> None:
        if event in FORBIDDEN:
            finish(f"{event} is not allowed")
        writes = event in CHANGING or (event == "open" and args[2] & WRITING)
        if writes and any(map(outside, args)):
            finish("writes outside its folder")

    return watch


if __name__ == "__main__":
    execute_request(sys.argv[1])
