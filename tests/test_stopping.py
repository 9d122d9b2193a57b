"""Ctrl-C and SIGTERM: noted where there is work to save, obeyed at once where there is none."""

import gc
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from dials_jax.commands import run_command
from dials_jax.stopping import Request, Stopped, ending_together, keeping, meet

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def handlers():
    """As they were, whatever a test sets."""
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    yield before
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_command_that_is_stopped_says_what_is_kept(signum, status, capsys):
    def command():
        with keeping(lambda: "less"), keeping(lambda: "step 3 is saved"):
            signal.raise_signal(signum)

    with pytest.raises(SystemExit) as end:
        run_command(command)
    assert end.value.code == status
    assert capsys.readouterr().err == "stopped: step 3 is saved\n"


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_that_comes_while_garbage_is_collected_is_not_lost(signum, status, times, capsys):
    left = [times]

    def send(phase, info):
        if phase == "start" and left[0]:
            left[0] -= 1
            signal.raise_signal(signum)

    def command():
        gc.callbacks.append(send)
        try:
            for _ in range(10):
                gc.collect()
                time.sleep(1)
        finally:
            gc.callbacks.remove(send)

    with pytest.raises(SystemExit) as end:
        run_command(command)
    assert end.value.code == status and left[0] < times
    assert capsys.readouterr().err == "stopped\n"


def test_other_errors_that_nothing_can_catch_are_said_as_before(monkeypatch):
    class Broken:
        def __del__(self):
            raise ValueError("at the end")

    def command():
        Broken()

    said = []
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    run_command(command)
    assert len(said) == 1
    assert sys.unraisablehook == said.append, "put back"


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_request_notes_the_signal_and_the_handlers_come_back(signum, handlers):
    with Request() as request:
        request.start()
        assert not request.came(meeting=True)
        signal.raise_signal(signum)
        assert request.came(meeting=False) and request.signum == signum
    assert {s: signal.getsignal(s) for s in SIGNALS} == handlers


def test_until_it_starts_a_request_lets_signals_through():
    with pytest.raises(KeyboardInterrupt), Request():
        signal.raise_signal(signal.SIGINT)


def test_a_second_ctrl_c_ends_the_process_at_once_and_a_second_sigterm_does_not():
    code = """
import signal, time
from dials_jax.stopping import Request
with Request() as request:
    request.start()
    for signum in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        print(signum.name, flush=True)
        signal.raise_signal(signum)
    print("too late", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT
    assert done.stdout.split() == ["SIGTERM", "SIGTERM", "SIGINT"]
    assert done.stderr.strip() == "stopping at the next step, to save it; Ctrl-C now ends at once"


def test_ignored_signals_stay_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Request() as request:
        request.start()
        signal.raise_signal(signal.SIGINT)
        assert not request.came(meeting=True)


def test_outside_the_main_thread_signals_are_left_alone(handlers):
    def work():
        with Request() as request:
            request.start()
            seen.append({s: signal.getsignal(s) for s in SIGNALS})

    seen = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [handlers]


def test_several_processes_agree_only_where_they_meet(monkeypatch):
    """The signal reached another process; this one hears of it in the collective."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    heard = []

    def gather(mine):
        heard.append(int(mine))
        return np.array([mine, signal.SIGTERM])

    monkeypatch.setattr(multihost_utils, "process_allgather", gather)
    with Request() as request:
        request.start()
        assert not request.came(meeting=False) and heard == []
        assert request.came(meeting=True) and heard == [0]
        assert request.came(meeting=True) and heard == [0]  # once
        assert request.signum == signal.SIGTERM


def test_where_results_are_kept_several_processes_end_together(monkeypatch):
    """Not within a batch; and one process alone ends at once."""
    noted = []
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda mine: np.array([mine, *noted]))
    meet()  # nothing is at work
    with pytest.raises(KeyboardInterrupt), ending_together():
        signal.raise_signal(signal.SIGINT)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with ending_together():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(Stopped) as mine:
            meet()
    with ending_together():
        meet()
        noted.append(signal.SIGTERM)
        with pytest.raises(Stopped) as theirs:
            meet()
    assert (mine.value.status, theirs.value.status) == (130, 143)
    noted.append(signal.SIGTERM)
    meet()


def test_what_a_signal_leaves_in_orbax_is_no_news_at_the_end():
    """Python warns of a coroutine that is never awaited, whenever it is removed."""
    code = """
import signal
from dials_jax.commands import run_command
async def never():
    pass
def command():
    waiting = never()
    signal.raise_signal(signal.SIGTERM)
run_command(command)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (143, "stopped\n")


def test_the_status_is_that_of_a_shell():
    assert (Stopped().status, Stopped("", signal.SIGTERM).status) == (130, 143)
    assert issubclass(Stopped, KeyboardInterrupt)


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_process_waits_for_no_thread(signum, status):
    """XLA compiles in threads; what they are at is of no use any more."""
    code = f"""
import signal, threading, time
from dials_jax.commands import run_as_process

def command():
    threading.Thread(target=time.sleep, args=(60,)).start()
    print("begun")
    signal.raise_signal({int(signum)})

run_as_process(command)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (status, "begun\n", "stopped\n")


def test_a_stopped_process_without_an_output_has_its_status():
    code = """
import signal
from dials_jax.commands import run_as_process
run_as_process(lambda: signal.raise_signal(signal.SIGTERM))
"""
    command = ["bash", "-c", 'exec "$0" -c "$1" >&-', sys.executable, code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (143, "stopped\n")


def test_a_process_that_ends_otherwise_waits_for_its_threads():
    code = """
import threading, time
from dials_jax.commands import run_as_process

def late():
    time.sleep(1)
    print("late")

run_as_process(lambda: threading.Thread(target=late).start())
"""
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, timeout=30).stdout == "late\n"
