"""Programs are executed in a process of their own; whatever they do, nothing of them is left."""

import os
import signal
import tempfile
import threading
import time
from pathlib import Path

import pytest

from dials_jax.evaluation import run_code
from dials_jax.evaluation.run_code import PASSED, execute_program, execute_programs

CORRECT = {
    "libraries": "import collections, heapq, itertools, math, random, re, typing\nmath.sqrt(4)",
    "a dataclass": (
        "from dataclasses import dataclass\n@dataclass\nclass A:\n  x: int\nassert A(1) == A(1)"
    ),
    "a file of its own": "open('a', 'w').write('x'); assert open('a').read() == 'x'",
    "a temporary file": (
        "import tempfile\nwith tempfile.TemporaryDirectory() as d: open(d + '/x', 'w').write('x')"
    ),
    "a little output": "print('x' * 1000); open('/dev/null', 'w').write('x')",
    "an empty environment": (
        "import os\nours = 'HOME TMPDIR OMP_NUM_THREADS OPENBLAS_NUM_THREADS LC_CTYPE'.split()"
        "\nassert set(os.environ) <= set(ours)"
    ),
}
WRONG = {
    "a false test": ("assert 1 + 1 == 3, 'no'", "AssertionError: no"),
    "no Python": ("def f(:", "SyntaxError"),
    "an infinite loop": ("while True: pass", "processor time"),
    "a deaf infinite loop": (
        "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
        "processor time",
    ),
    "endless recursion": ("def f(): return f()\nf()", "RecursionError"),
    "much memory": ("x = [0] * 10**9", "MemoryError"),
    "huge output": ("while True: print('x' * 10**6)", "File too large"),
    "a huge file": ("f = open('x', 'w')\nwhile True: f.write('x' * 10**6)", "File too large"),
    "reading input": ("input()", "EOFError"),
    "leaving early": ("import sys\nsys.exit(0)\nassert False", "SystemExit"),
    "leaving at once": ("import os\nos._exit(0)", "exit code 0 before its tests"),
    "a fork, caught": ("import os\ntry: os.fork()\nexcept BaseException: pass", "os.fork is not"),
    "a command, caught": (
        "import subprocess\ntry: subprocess.run(['true'])\nexcept BaseException: pass",
        "Popen is not allowed",
    ),
    "a signal": ("import os\nos.kill(os.getppid(), 0)", "os.kill is not allowed"),
    "a connection": ("import socket\nsocket.socket()", "socket.__new__ is not allowed"),
    "a folder elsewhere": ("import os\nos.mkdir('{outside}/x')", "outside its folder"),
    "a file elsewhere": (
        "try: open('{outside}/x', 'w')\nexcept BaseException: pass",
        "outside its folder",
    ),
    "a link elsewhere": ("import os\nos.symlink('{outside}', 'x')", "outside its folder"),
    "removing a file": ("import os\nos.remove('{outside}/mine')", "outside its folder"),
}


def children():
    """The processes whose parent is this one."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[1] == str(os.getpid()):
            found.append(stat.parent.name)
    return found


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A folder for programs, empty in the end, and one that none of them may touch."""
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    (outside / "mine").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(inside))
    before = children()
    yield inside, outside
    assert list(inside.iterdir()) == []
    assert [path.name for path in outside.iterdir()] == ["mine"]
    assert set(children()) <= set(before)


def test_correct_programs_pass(folders):
    verdicts = dict(zip(CORRECT, execute_programs(list(CORRECT.values()), 2), strict=True))
    assert verdicts == dict.fromkeys(CORRECT, PASSED)


def test_what_goes_wrong_fails_and_leaves_nothing(folders):
    programs = [p.replace("{outside}", str(folders[1])) for p, _ in WRONG.values()]
    verdicts = execute_programs(programs, 1)
    for (name, (_, expected)), verdict in zip(WRONG.items(), verdicts, strict=True):
        assert verdict != PASSED and expected in verdict, name


def test_a_program_that_waits_is_ended(folders, monkeypatch):
    monkeypatch.setattr(run_code, "WALL", 0.5)
    start = time.monotonic()
    assert execute_program("import time\ntime.sleep(1000)", 1) == "takes more than 0.5 s"
    assert time.monotonic() - start < 20


def test_an_interrupted_program_is_ended(folders, monkeypatch):
    wait, calls = run_code.subprocess.Popen.wait, []

    def interrupt(process, *args):
        calls.append(args)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return wait(process, *args)

    monkeypatch.setattr(run_code.subprocess.Popen, "wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        execute_program("import time\ntime.sleep(1000)", 1)
    assert len(calls) == 2


@pytest.mark.skipif(
    threading.current_thread() is not threading.main_thread(), reason="only that one gets signals"
)
def test_an_interrupted_command_ends_its_programs_at_once(folders):
    """Ctrl-C, where one or two programs run and others wait for their turn."""
    start = time.monotonic()
    timer = threading.Timer(1, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        execute_programs(["import time\ntime.sleep(1000)"] * (os.cpu_count() + 2), 60)
    timer.join()
    assert time.monotonic() - start < 20


@pytest.mark.skipif(not Path("/proc/self/net/dev").exists(), reason="only Linux lists interfaces")
def test_there_is_no_network(folders):
    """Best effort: an own network has no interface but the loopback."""
    program = (
        "lines = open('/proc/self/net/dev').read().splitlines()[2:]\n"
        "assert {line.split(':')[0].strip() for line in lines} <= {'lo'}"
    )
    if execute_program(program, 2) != PASSED:
        pytest.skip("this kernel gives no process a network of its own")
