"""Where processes meet without their devices: at JAX's coordinator.

Programs of several processes run in the order in which each process gives them to its devices. A
thread beside a training cannot keep to one order with it, so threads of all processes meet here.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax._src.distributed import global_state

from dials_jax.errors import InputError

FAILED = ("said", "failed")
PAUSES = (0.01, 0.2)  # seconds between two looks at the coordinator: the first, and the longest


def problem_on_first_process(action: Callable[[], Any]) -> Exception | None:
    """Runs `action` on the first process. Returns: what it raised, for all to be told first."""
    if jax.process_index() == 0:
        try:
            action()
        except Exception as error:
            return error
    return None


class Meeting:
    """One thread of every process, which come to the same places in the same order.

    None waits for long once one has failed. One process alone meets nobody.

    Args:
      name: the same on all processes, and of this meeting alone.
    """

    def __init__(self, name: str):
        self._name = name
        self._agreed = itertools.count()

    def on_first_process(self, action: Callable[[], Any]) -> None:
        """Runs `action` on one process while the others wait. Raises: as `agree`."""
        self.agree(problem_on_first_process(action))

    def agree(self, problem: Exception | None) -> None:
        """Waits until all processes have said that they have no problem.

        Raises: the problem; on the other processes an InputError that says whose message to read.
        """
        if problem is not None:
            self.fail()
            raise problem
        self.wait(f"agreed {next(self._agreed)}")

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """An error from inside is told to the other processes, too."""
        try:
            yield
        except BaseException:
            self.fail()
            raise

    def fail(self) -> None:
        """Tells the other processes, wherever they wait, that this one does not come."""
        if jax.process_count() > 1:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one was the first
                global_state.client.key_value_set(self._key(*FAILED), str(jax.process_index()))

    def wait(self, place: str) -> None:
        """Waits until all processes are at a place. Raises: InputError if one has failed."""
        if jax.process_count() == 1:
            return
        place = place.replace("/", " ")
        global_state.client.key_value_set(self._key("came", place, str(jax.process_index())), "")
        _poll(lambda: self._are_all_at(place))

    def close(self) -> None:
        """Ends the meeting, of which nothing is kept.

        The first process leaves last. The coordinator is a part of it, and would be gone with it
        while others still ask.
        """
        if jax.process_count() == 1:
            return
        client, left = global_state.client, self._key("left")
        if jax.process_index():
            client.key_value_set(f"{left}/{jax.process_index()}", "")
        else:
            others = jax.process_count() - 1
            _poll(lambda: len(client.key_value_dir_get(left)) == others)
            _tidy(self._name)

    def _are_all_at(self, place: str) -> bool:
        """The first process counts who came, so that the others ask for little."""
        client = global_state.client
        said = dict(client.key_value_dir_get(self._key("said")))
        if number := said.get(self._key(*FAILED)):
            raise InputError(f"process {number} has stopped; its message says why")
        if self._key("said", "all", place) in said:
            return True
        if jax.process_index() == 0:
            came = self._key("came", place)
            if len(client.key_value_dir_get(came)) == jax.process_count():
                client.key_value_set(self._key("said", "all", place), "")
                _tidy(came)
                return True
        return False

    def _key(self, *parts: str) -> str:
        return "/".join([self._name, *parts])


def _tidy(key: str) -> None:
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # the others may have gone on
        global_state.client.key_value_delete(key)


def _poll(done: Callable[[], bool]) -> None:
    pause, longest = PAUSES
    while not done():
        time.sleep(pause)
        pause = min(2 * pause, longest)
