"""Threads of several processes meet at a coordinator, and none waits for one that has failed."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import pytest

from dials_jax import meeting
from dials_jax.errors import InputError
from dials_jax.meeting import Meeting
from dials_jax.stored import saves_without_devices

COUNT = 3


class Coordinator:
    """What JAX's coordinator does with values: keys are paths, and a folder is asked for whole."""

    def __init__(self):
        self.values: dict[str, str] = {}
        self.lock = threading.Lock()

    def key_value_set(self, key, value):
        with self.lock:
            if key in self.values:
                raise jax.errors.JaxRuntimeError("ALREADY_EXISTS")
            self.values[key] = value

    def key_value_dir_get(self, folder):
        with self.lock:
            return [(k, v) for k, v in self.values.items() if k.startswith(f"{folder}/")]

    def key_value_delete(self, folder):
        with self.lock:
            for key in [k for k in self.values if f"{k}/".startswith(f"{folder}/")]:
                del self.values[key]


@pytest.fixture
def together(monkeypatch):
    """Calls a function as each of three processes: (meeting, number). Returns: what each gave."""
    own, coordinator = threading.local(), Coordinator()
    monkeypatch.setattr(meeting.jax, "process_index", lambda: own.number)
    monkeypatch.setattr(meeting.jax, "process_count", lambda: COUNT)
    monkeypatch.setattr(meeting.global_state, "client", coordinator)

    def call(work):
        def one(number):
            own.number = number
            try:
                return work(Meeting("save 1"), number)
            except Exception as error:
                return error

        with ThreadPoolExecutor(COUNT) as pool:
            return list(pool.map(one, range(COUNT))), coordinator

    return call


def test_all_go_on_when_the_last_has_come(together):
    here, seen = [], []

    def work(meeting, number):
        for place in ("a", "a/b", "c"):  # a place is not within another one
            here.append(place)
            meeting.wait(place)
            seen.append(here.count(place))

    results, coordinator = together(work)
    assert results == [None] * COUNT
    assert seen == [COUNT] * 9
    assert not any("came" in key for key in coordinator.values)  # nothing adds up per process


def test_the_first_leaves_last_and_nothing_is_kept(together):
    left = []

    def work(meeting, number):
        meeting.wait("the end")
        time.sleep(0.1 * number)
        left.append(number)
        meeting.close()
        return sorted(left) if number == 0 else None

    results, coordinator = together(work)
    assert results[0] == [0, 1, 2]
    assert not coordinator.values


def test_an_action_runs_on_the_first_alone_before_the_others_go_on(together):
    done = []

    def work(meeting, number):
        meeting.on_first_process(lambda: done.append(number))
        return list(done)

    assert together(work)[0] == [[0]] * COUNT


@pytest.mark.parametrize("failing", [0, 2])
def test_a_failure_reaches_those_that_wait_anywhere(together, failing):
    def work(meeting, number):
        with meeting.telling():  # who is told tells nothing new
            if number == failing:
                meeting.agree(OSError("the disk is full"))
            meeting.wait("within a save")

    results, _ = together(work)
    assert str(results.pop(failing)) == "the disk is full"
    for error in results:
        assert isinstance(error, InputError)
        assert str(error) == f"process {failing} has stopped; its message says why"


def test_this_version_of_orbax_saves_at_a_meeting():
    assert saves_without_devices()
