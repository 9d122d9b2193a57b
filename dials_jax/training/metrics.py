"""Measures how fast training is, and writes its metrics to `metrics.jsonl` and TensorBoard."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from dials_jax import trees
from dials_jax.data.batches import Batch
from dials_jax.records import Lines, format_line
from dials_jax.training.losses import Metrics, merge_metrics
from dials_jax.training.step import TrainState, TrainStep

log = logging.getLogger(__name__)


class MeteredStep:
    """The training step, and what the log says of the steps since its last line.

    Tokens per second are those of the steps that wait for no compilation. Batches with padding are
    another program than those without, so the first of either kind is compiled. The host waits for
    the device before and after these, and not around the others.

    Attributes:
      window: the metrics of the steps since `restart`. A run that was stopped between two lines
        goes on with those that its checkpoint has kept.
    """

    def __init__(self, step: TrainStep, window: Sequence[Metrics] = ()):
        self._step, self._kinds = step, set()
        self.restart()
        self.window += window

    def __call__(
        self, state: TrainState, frozen: trees.Params, batch: Batch
    ) -> tuple[TrainState, Metrics]:
        kind = jax.tree.structure(batch)
        if kind in self._kinds:
            self._tokens += batch.tokens.size
            out = self._step(state, frozen, batch)
        else:
            self._kinds.add(kind)
            jax.block_until_ready(state)
            self._seconds += time.perf_counter() - self._since if self._tokens else 0.0
            out = jax.block_until_ready(self._step(state, frozen, batch))
            self._since = time.perf_counter()
        self.window.append(out[1])
        return out

    def restart(self) -> None:
        """Counts from here on."""
        self.window: list[Metrics] = []
        self._tokens, self._seconds, self._since = 0, 0.0, time.perf_counter()

    def means(self) -> dict[str, float]:
        """Over the window, with the rate. The host waits for its steps."""
        return merge_metrics(jax.device_get(self.window)) | self.rate()

    def rate(self) -> dict[str, float]:
        """`tokens_per_second` since `restart`, once the steps have ended; {} if all compiled."""
        seconds = self._seconds + time.perf_counter() - self._since
        return {"tokens_per_second": self._tokens / seconds} if self._tokens else {}


class MetricsWriter:
    """Writes the metrics of a step as one line of JSON, and to TensorBoard if that is installed.

    A line ends with its digest. Lines of steps after `step`, where the run continues, are removed
    first. One that is damaged, or not the record of a step, is moved to `metrics.odd.jsonl`, with a
    warning. Only process 0 writes.

    Args:
      unlogged: the steps up to `step` that the next line is also of.
    """

    def __init__(self, workdir: Path, step: int, unlogged: int = 0):
        self._active = jax.process_index() == 0
        if not self._active:
            return
        path = workdir / "metrics.jsonl"
        _drop_later_steps(path, step, unlogged)
        self._file = path.open("a", encoding="utf-8")
        self._board = _open_tensorboard(workdir / "tensorboard", step)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends the metrics of one step."""
        if not self._active:
            return
        self._file.write(format_line({"step": step, **values}) + "\n")
        self._file.flush()
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        if self._active:
            self._file.close()
            if self._board:
                self._board.close()


def _drop_later_steps(path: Path, step: int, unlogged: int) -> None:
    """Keeps the records of steps up to `step`; moves lines that are no records to another file."""
    lines = Lines.read(path, _check_record)
    if lines.odd:
        odd = lines.name_odd()
        log.warning("%s, %s: no record of a step; moved to %s", path, odd, lines.aside)
    lines.good = {number: x for number, x in lines.good.items() if x["step"] <= step}
    steps = {0, *(record["step"] for record in lines.good.values())}
    logged = step - unlogged  # what is saved is logged before, or kept beside the state
    if logged not in steps:
        log.warning("%s lacks lines: it ends at step %d of %d", path, max(steps), logged)
    lines.mend()


def _check_record(record: Any) -> None:
    step = record["step"]
    if type(step) is not int or not 0 <= step < 2**63:
        raise ValueError(f"step {step!r}")


def _open_tensorboard(folder: Path, step: int):
    """Returns a writer that drops what was written after `step`; None without tensorboardX."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)
