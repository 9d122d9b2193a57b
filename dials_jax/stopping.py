"""Ending a process on request: Ctrl-C, or SIGTERM from a scheduler or a machine that shuts down.

A command then ends with `Stopped`, whose message says what was saved. A loop that has work to save
records the signal (`Request`) and ends at its next safe point; other code ends at once. Several
processes end together: where results are kept as they come, `ending_together` and `meet` do that.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import numpy as np

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SECONDS_TO_AGAIN = 0.05


class Stopped(KeyboardInterrupt):
    """The process was asked to end. The message says what was saved and how to continue."""

    def __init__(self, message: str = "", signum: int = signal.SIGINT):
        super().__init__(message)
        self.message = message
        self.signum = signum

    @property
    def status(self) -> int:
        """The exit status that a shell reports for a process that this signal ended."""
        return 128 + self.signum


@contextlib.contextmanager
def keeping(kept: Callable[[], str]) -> Iterator[None]:
    """A `Stopped` from inside without a message gets `kept()` as its message."""
    try:
        yield
    except KeyboardInterrupt as stop:
        stop = stop if isinstance(stop, Stopped) else Stopped()
        raise Stopped(stop.message or kept(), stop.signum) from None


def obey_sigterm() -> None:
    """SIGTERM ends the process as Ctrl-C does: by an exception, so that files are closed."""

    def stop(signum, frame):
        raise Stopped(signum=signum)

    _listen(signal.SIGTERM, stop)


@contextlib.contextmanager
def sending_again() -> Iterator[None]:
    """A signal whose exception Python drops is sent again, until the end of the `with`.

    Python drops an exception where nothing could catch it, such as in a callback of its garbage
    collector. JAX has one, and while it traces, one signal in eight came there: the process went
    on.
    """
    before, timers = sys.unraisablehook, []

    def send_again(dropped: sys.UnraisableHookArgs) -> None:
        stop = dropped.exc_value
        if not isinstance(stop, KeyboardInterrupt):
            return before(dropped)
        signum = stop.signum if isinstance(stop, Stopped) else signal.SIGINT
        # Later: at once it would come to this function, where nothing could catch it, either.
        timer = threading.Timer(SECONDS_TO_AGAIN, os.kill, (os.getpid(), signum))
        timer.daemon = True
        timers.append(timer)
        timer.start()

    sys.unraisablehook = send_again
    try:
        yield
    finally:
        sys.unraisablehook = before
        for timer in timers:
            timer.cancel()


def _listen(signum: int, handler: Callable) -> bool:
    """Sets a handler if this is the main thread and the signal is not ignored on purpose."""
    if threading.current_thread() is not threading.main_thread():
        return False
    if signal.getsignal(signum) is signal.SIG_IGN:  # a job that a script put into the background
        return False
    signal.signal(signum, handler)
    return True


class Request:
    """Records that the process is asked to end, from `start()` to the end of the `with`.

    After the first signal another Ctrl-C ends the process at once. Of several processes all record
    it for the whole `with`: one that ended alone would leave the others waiting for it.

    Args:
      when: the process will end, said at the first signal.
    """

    signum: int | None = None  # of the first signal; on several processes, once they have agreed

    def __init__(self, when: str = "at the next step, to save it"):
        self._when = when
        self._noted: int | None = None
        self._before: dict[int, Callable | int | None] = {}

    def __enter__(self) -> Request:
        import jax  # late: it takes a second, which --help need not wait for

        if jax.process_count() > 1:
            self.start()
        return self

    def start(self) -> None:
        """Call it when there is something to save; until then a signal ends one process at once."""
        if self._before:
            return
        before = {signum: signal.getsignal(signum) for signum in SIGNALS}
        self._before = {s: b for s, b in before.items() if _listen(s, self._note)}

    def _note(self, signum: int, frame: object) -> None:
        if self._noted is None:
            self._noted = signum
            # Not print(): the signal may have come in the middle of one.
            os.write(2, f"\nstopping {self._when}; Ctrl-C now ends at once\n".encode())
        if signal.SIGINT in self._before:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def came(self, meeting: bool) -> bool:
        """Whether to end, the same on every process. Several agree only at a `meeting`."""
        import jax

        if self.signum is None:
            if jax.process_count() == 1:
                self.signum = self._noted
            elif meeting:
                from jax.experimental import multihost_utils

                noted = multihost_utils.process_allgather(np.int32(self._noted or 0))
                self.signum = int(np.max(noted)) or None
        return self.signum is not None

    def obey(self) -> None:
        """Every process calls this. Raises: Stopped, on all, if one of them was asked to end."""
        if self.came(meeting=True):
            raise Stopped(signum=self.signum)

    def finish(self) -> None:
        """Call it when all is saved; from then on a signal ends one process at once, as before."""
        import jax

        if jax.process_count() == 1:
            self._restore()

    def __exit__(self, *error: object) -> None:
        self._restore()

    def _restore(self) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}


_at_work: ContextVar[Request | None] = ContextVar("at_work", default=None)


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Several processes end at their next `meet` if one of them is asked to; one ends at once."""
    with Request("after the batch at work, to keep it") as request:
        before = _at_work.set(request)
        try:
            yield
        finally:
            _at_work.reset(before)


def meet() -> None:
    """Every process calls this where a result has been kept. Raises: Stopped, as `Request.obey`."""
    if request := _at_work.get():
        request.obey()
