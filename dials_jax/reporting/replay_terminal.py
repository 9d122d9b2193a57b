"""Plays a replay in a terminal, call by call; elsewhere prints a line for each block."""

from __future__ import annotations

import io
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator
from typing import Any
from unicodedata import east_asian_width

import numpy as np

from dials_jax.reporting.replay import Replay, ReplayRun, Scene

BLANK = "░"
RAN, LEFT_OUT = "█", "·"
# Of 256 colours, by confidence: orange, pale orange, grey, pale blue, blue, each with its text's.
CONFIDENCE = ((0.2, "48;5;166;97"), (0.5, "48;5;215;30"), (0.8, "48;5;254;30"),
              (0.95, "48;5;153;30"), (2.0, "48;5;25;97"))  # fmt: skip


def play(replay: Replay, stream: io.TextIOBase | None = None, delay: float = 0.1) -> None:
    """Shows every prompt's calls one after the other.

    Args:
      stream: None is the standard output. Only a terminal shows every call.
      delay: seconds between two calls.
    """
    stream = sys.stdout if stream is None else stream
    for scene in replay.scenes:
        if stream.isatty():
            animate(replay, scene, stream, delay)
        else:
            for line in block_lines(replay, scene):
                print(line, file=stream, flush=True)


def animate(replay: Replay, scene: Scene, stream: io.TextIOBase, delay: float) -> None:
    """Draws every call over the one before."""
    width, height = shutil.get_terminal_size()
    drawn = 0
    for call in range(max(run.nfe for run in scene.runs) + 1):
        lines = frame(replay, scene, call, width)[: height - 1]
        back = f"\x1b[{drawn}F\x1b[J" if drawn else ""
        stream.write(back + "".join(f"{line}\n" for line in lines))
        stream.flush()
        drawn = len(lines)
        time.sleep(delay)


def frame(replay: Replay, scene: Scene, call: int, width: int) -> list[str]:
    """The lines after so many calls."""
    prompt = "".join(printable(replay, token) for token in scene.canvas[: scene.start])
    lines = textwrap.wrap(f"> {prompt}", width, subsequent_indent="  ")[-2:]
    for run in scene.runs:
        now = min(call, run.nfe)
        lines += ["", cost_line(scene, run, now)[:width], layer_line(run, now)[:width]]
        lines += colored_answer(replay, scene, run, now, width)
    return lines


def cost_line(scene: Scene, run: ReplayRun, call: int) -> str:
    share = run.flops[:call].sum() / scene.full_flops
    layers = f"layers run {run.layers[:call].mean():.1%}" if call else "layers run -"
    return f"{run.name}: call {call} of {run.nfe}, {layers}, {share:.1%} of full depth's FLOPs"


def layer_line(run: ReplayRun, call: int) -> str:
    """The layers of the last call, and its model."""
    if not call:
        return LEFT_OUT * run.layers.shape[1]
    layers = "".join(RAN if ran else LEFT_OUT for ran in run.layers[call - 1])
    return f"{layers} {run.letters[call - 1 : call]}".rstrip()


def colored_answer(
    replay: Replay, scene: Scene, run: ReplayRun, call: int, width: int
) -> list[str]:
    """The answer, coloured by confidence, in lines of this width."""
    lines, used = [""], 0
    end = min(len(scene.canvas), scene.start + run.num_tokens)
    for at in range(scene.start, end):
        text, color = BLANK, "2"
        if run.written[:call, at].any() or not scene.blank[at]:
            text, color = printable(replay, run.tokens[max(call - 1, 0), at]), "0"
            confidence = np.exp(run.log_probs[call - 1, at])
            if np.isfinite(confidence):
                color = next(style for most, style in CONFIDENCE if confidence < most)
        size = sum(1 + (east_asian_width(c) in "WF") for c in text)  # in cells of the terminal
        if used and used + size > width:
            lines, used = [*lines, ""], 0
        lines[-1] += f"\x1b[{color}m{text}\x1b[0m"
        used += size
    return lines


def block_lines(replay: Replay, scene: Scene) -> Iterator[str]:
    """The prompt, and each run's blocks as they were when they were filled."""
    yield "> " + "".join(printable(replay, token) for token in scene.canvas[: scene.start])
    starts = range(scene.first_block, scene.start + max(run.num_tokens for run in scene.runs))
    for run in scene.runs:
        for number, first in enumerate(starts[:: replay.block_length]):
            end = min(first + replay.block_length, scene.start + run.num_tokens)
            start = max(first, scene.start)
            if start >= end:
                break
            call = 1 + max(int(np.flatnonzero(w).max(initial=0)) for w in run.written.T[start:end])
            text = "".join(printable(replay, token) for token in run.tokens[-1, start:end])
            yield f"{cost_line(scene, run, call)}; block {number + 1}: {text}"


def printable(replay: Replay, token: Any) -> str:
    """A token's text without control characters, which a terminal would obey.

    Args:
      token: an integer, also of NumPy.
    """
    text = replay.pieces[int(token)].replace("\n", "⏎")
    return "".join(c if c.isprintable() else "�" for c in text)
