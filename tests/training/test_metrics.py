"""Metrics of a run that stops and goes on, and its progress where nobody watches."""

import io
import json
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from dials_jax import progress
from dials_jax.data.batches import Batch
from dials_jax.progress import ProgressLines, progress_bar
from dials_jax.training import metrics
from dials_jax.training.metrics import MeteredStep, MetricsWriter
from dials_jax.training.step import TrainState


def write(workdir, start, values):
    writer = MetricsWriter(workdir, start)
    for step, loss in values.items():
        writer.write(step, {"loss": loss})
    writer.close()


def read(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return {(line := json.loads(x))["step"]: line["loss"] for x in lines}


def test_continuing_drops_what_came_after_the_checkpoint(tmp_path):
    write(tmp_path, 0, {10: 1.0, 20: 2.0, 30: 3.0})
    write(tmp_path, 20, {30: 4.0})
    assert read(tmp_path) == {10: 1.0, 20: 2.0, 30: 4.0}


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path):
    write(tmp_path, 0, {10: 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "lo')
    write(tmp_path, 20, {30: 3.0})
    assert read(tmp_path) == {10: 1.0, 30: 3.0}


ODD = [
    b"12", b"null", b'{"loss": 1.0}', b'{"step": "7"}', b'{"step": true}', b'{"step": -1}',
    b'{"step": 1e3}', b'{"step": ' + b"9" * 30 + b"}", b'{"step": ' + b"9" * 5000 + b"}",
    b'{"step": 10, "loss": \xff}', b"[" * 100_000, b"",
]  # fmt: skip


@pytest.mark.parametrize("odd", ODD, ids=range(len(ODD)))
def test_an_odd_line_is_named_and_set_aside(odd, tmp_path, caplog):
    write(tmp_path, 0, {10: 1.0})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(odd + b"\n")
    write(tmp_path, 20, {30: 3.0})
    assert read(tmp_path) == {10: 1.0, 30: 3.0}
    assert (tmp_path / "metrics.odd.jsonl").read_bytes() == odd + b"\n"
    assert "metrics.jsonl, line 2: no record of a step; moved to" in caplog.text
    write(tmp_path, 30, {40: 4.0})  # from then on nothing is odd
    assert (tmp_path / "metrics.odd.jsonl").read_bytes() == odd + b"\n"


def test_a_flipped_digit_is_set_aside(tmp_path, caplog):
    write(tmp_path, 0, {10: 1.25, 20: 2.0})
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().replace("1.25", "1.35"))
    write(tmp_path, 20, {30: 3.0})
    assert read(tmp_path) == {20: 2.0, 30: 3.0}
    assert "1.35" in (tmp_path / "metrics.odd.jsonl").read_text()
    assert "metrics.jsonl, line 1: no record of a step; moved to" in caplog.text


def test_lines_that_are_lost_are_missed(tmp_path, caplog):
    write(tmp_path, 0, {10: 1.0, 20: 2.0})
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    write(tmp_path, 20, {30: 3.0})
    assert "metrics.jsonl lacks lines: it ends at step 10 of 20" in caplog.text


def test_steps_that_a_checkpoint_keeps_need_no_line(tmp_path, caplog):
    write(tmp_path, 0, {10: 1.0})
    MetricsWriter(tmp_path, 13, unlogged=3).close()
    assert not caplog.records
    MetricsWriter(tmp_path, 13).close()  # without what it has kept
    assert "metrics.jsonl lacks lines: it ends at step 10 of 13" in caplog.text


def test_a_fresh_start_drops_everything(tmp_path):
    write(tmp_path, 0, {10: 1.0})
    write(tmp_path, 0, {10: 5.0})
    assert read(tmp_path) == {10: 5.0}


def test_tensorboard_files_are_written(tmp_path):
    write(tmp_path, 0, {10: 1.0})
    [file] = (tmp_path / "tensorboard").iterdir()
    assert "tfevents" in file.name and b"loss" in file.read_bytes()


@pytest.fixture
def run_bar(monkeypatch):
    """Counts 50 steps on a standard error that is, or is not, a terminal; returns its text."""

    def run(terminal):
        stream = io.StringIO()
        stream.isatty = lambda: terminal
        monkeypatch.setattr("sys.stderr", stream)
        with progress_bar(50, 0, "model") as bar:
            for step in range(50):
                bar.update()
                bar.set_postfix_str(f"loss {step}", refresh=False)
        return stream.getvalue()

    return run


def test_a_log_gets_whole_lines_and_few_of_them(run_bar):
    text = run_bar(terminal=False)
    assert "\r" not in text and text.endswith("\n")
    first, last = text.splitlines()  # 50 steps take far less than the time between two lines
    assert "0/50" in first
    assert "50/50" in last and "loss 49" in last


def test_a_log_gets_a_line_whenever_it_is_time(run_bar, monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0)
    lines = run_bar(terminal=False).splitlines()
    assert len(lines) >= 50 and "\r" not in "".join(lines)


def test_a_terminal_gets_a_live_bar(run_bar):
    assert "\r" in run_bar(terminal=True)


def test_lines_leave_out_blanks():
    stream = io.StringIO()
    lines = ProgressLines(stream)
    for text in ("\r1/3  ", "", "\n", "\r2/3"):
        lines.write(text)
    assert stream.getvalue() == "1/3\n2/3\n"


# ------------------------------------------------------------------------------- how fast it is


def test_the_rate_leaves_out_steps_that_were_compiled(monkeypatch):
    """A step takes 2 s, and 100 more where its program is new; there are 12 tokens in a batch."""
    now, compiled = [0.0], set()
    monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def step(state, frozen, batch):
        now[0] += 2.0 if (batch.valid is None) in compiled else 102.0
        compiled.add(batch.valid is None)
        return state, {}

    tokens = np.zeros((3, 4), np.int32)
    whole = Batch(tokens, tokens > 0, None, np.arange(3))
    padded = whole._replace(valid=tokens == 0)
    state, metered = TrainState(jnp.int32(0), {}, (), jnp.int32(-1)), MeteredStep(step)

    def rate(*batches):
        metered.restart()
        for batch in batches:
            metered(state, {}, batch)
        return metered.rate()

    assert rate(whole) == {}
    assert rate(whole) == {"tokens_per_second": 6.0}
    assert rate(whole, padded, whole, whole) == {"tokens_per_second": 6.0}
    assert rate(padded, whole) == {"tokens_per_second": 6.0}
