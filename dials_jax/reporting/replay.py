"""A generation, call by call, as a page: which token at which call, by which layers, at what cost.

    Replay             settings, and the texts of tokens
      Scene            one prompt
        ReplayRun      its generation at full depth
        ReplayRun      the same, where layers, tokens or steps are left out

The page is one file without a network; `replay.html` is its template, whose script draws what
`page_data` returns. `replay_terminal` plays the same in a terminal.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from dials_jax.errors import require
from dials_jax.files import local_path
from dials_jax.sampling.generation import Generation
from dials_jax.sampling.model_schedule import Schedule

IN_NOTEBOOK = "width: 100%; height: 46rem; border: 0"


@dataclass(frozen=True, repr=False)
class ReplayRun:
    """One sequence's own model calls, S of them.

    Attributes:
      name: what is left out.
      tokens, log_probs, depth: after and in each call; see `Trajectory`.
      written: where a call wrote a token. Its log-probability is NaN if it only fills what follows
        an end of text.
      layers: 1 where a layer ran; under guidance the share of both halves.
      tokens_run: that a layer computes where it runs.
      flops: of each call.
      full_flops: of a call that leaves out nothing.
      num_tokens: up to and with the end of text.
      letters: the model of each call; empty without a schedule.
    """

    name: str
    tokens: Int[np.ndarray, "S T"]
    log_probs: Float[np.ndarray, "S T"]
    depth: Int[np.ndarray, "S T"]
    written: Bool[np.ndarray, "S T"]
    layers: Float[np.ndarray, "S L"]
    tokens_run: Int[np.ndarray, "S L"]
    flops: Float[np.ndarray, "S"]
    full_flops: float
    num_tokens: int
    letters: str

    @property
    def nfe(self) -> int:
        return len(self.tokens)

    @property
    def layers_run(self) -> float:
        """As `Generation.layers_run`."""
        return float(self.layers.mean())


@dataclass(frozen=True, repr=False)
class Scene:
    """One prompt and what became of it.

    Attributes:
      canvas: before the first call.
      blank: where nothing stands in it yet.
      start: where the answer begins.
      first_block: where the first block begins that the answer has a part of.
      runs: what is watched comes last; full depth, if there is one, first.
    """

    canvas: Int[np.ndarray, "T"]
    blank: Bool[np.ndarray, "T"]
    start: int
    first_block: int
    runs: tuple[ReplayRun, ...]

    def answer(self, run: ReplayRun) -> list[int]:
        """Tokens up to and with the end of text."""
        return run.tokens[-1, self.start : self.start + run.num_tokens].tolist()

    @property
    def full_flops(self) -> float:
        """What costs are a share of: the run at full depth, or as many calls without skipping."""
        first = self.runs[0]
        return float(first.flops.sum()) if len(self.runs) > 1 else first.full_flops * first.nfe

    def totals(self, run: ReplayRun) -> dict[str, Any]:
        """The costs of a whole run."""
        answer = slice(self.start, self.start + run.num_tokens)
        return {
            "passes": run.nfe,
            "tokens_per_pass": int(run.written[:, answer].any(axis=0).sum()) / run.nfe,
            "layers_run": run.layers_run,
            "flops_share": float(run.flops.sum()) / self.full_flops,
            "equal": self.answer(run) == self.answer(self.runs[0]),
        }


@dataclass(frozen=True, repr=False)
class Replay:
    """Generations that can be played again: shown by a notebook, or saved as a page.

    Attributes:
      pieces: the text of each token.
      special: tokens that are no text, as an end of text.
      settings: names and values, for the page.
      block_length: tokens that the sampler fills before those to their right.
      shift: a token is predicted by the position this many to its left.
    """

    scenes: tuple[Scene, ...]
    pieces: Mapping[int, str]
    special: frozenset[int]
    settings: Mapping[str, str]
    block_length: int
    shift: int

    def __repr__(self) -> str:
        """A line for each run."""
        lines = [f"Replay({len(self.scenes)} prompt{'s' * (len(self.scenes) > 1)})"]
        for scene in self.scenes:
            for run in scene.runs:
                total = scene.totals(run)
                text = self.text(scene.answer(run))
                lines.append(
                    f"  {run.name}: {text[:60]!r}, {run.nfe} passes, layers run "
                    f"{run.layers_run:.1%}, FLOPs {total['flops_share']:.1%}"
                )
        return "\n".join(lines)

    def text(self, tokens: list[int]) -> str:
        return "".join(self.pieces[token] for token in tokens if token not in self.special)

    def to_html(self) -> str:
        """The page."""
        template = files("dials_jax.reporting").joinpath("replay.html").read_text("utf-8")
        # In JSON "<" may stand for itself only in texts, where its code does as well: no text of a
        # model can end the script.
        data = json.dumps(page_data(self), ensure_ascii=False, separators=(",", ":"))
        return template.replace("__DATA__", data.replace("<", "\\u003c"))

    def _repr_html_(self) -> str:
        return f'<iframe srcdoc="{escape(self.to_html())}" style="{IN_NOTEBOOK}"></iframe>'

    def save(self, path: str | Path) -> Path:
        """Writes the page; returns where it is. Raises: InputError if it cannot be written."""
        path = local_path(path, "the page")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self.to_html(), encoding="utf-8")
        except OSError as error:
            require(False, f"the page {path} cannot be written: {error.strerror}")
        return path


def run_of(
    out: Generation,
    sequence: int,
    name: str,
    canvas: Int[np.ndarray, "T"],
    schedule: Schedule | None = None,
) -> ReplayRun:
    """A sequence of a generation with a trajectory, as it was alone.

    Args:
      canvas: before the first call, without padding.
      schedule: which model takes which steps; None: one takes all.
    """
    own, unpadded = out.own[:, sequence], slice(out.tokens.shape[1] - len(canvas), None)
    kept, halves = out.trajectory, out.gates.shape[2] // len(out.tokens)
    gates = out.gates.reshape(*out.gates.shape[:2], halves, -1)[own, :, :, sequence]
    tokens, log_probs, depth = (x[own, sequence, unpadded] for x in kept[:3])
    letters = schedule.each_step if schedule else ""
    steps = np.minimum(out.steps[own], len(letters) - 1)
    return ReplayRun(
        name=name,
        tokens=tokens,
        log_probs=log_probs,
        depth=depth,
        written=written_by(tokens, log_probs, canvas),
        layers=gates.mean(axis=2),
        tokens_run=out.tokens_run[own],
        flops=kept.flops[own, sequence],
        full_flops=kept.full_flops,
        num_tokens=int(out.num_tokens[sequence]),
        letters="".join(letters[step] for step in steps) if letters else "",
    )


def written_by(
    tokens: Int[np.ndarray, "S T"],
    log_probs: Float[np.ndarray, "S T"],
    canvas: Int[np.ndarray, "T"],
) -> Bool[np.ndarray, "S T"]:
    """Where each call wrote: a token changed, or the log-probability of the one that stands there.

    A causal model's canvas has no [MASK], and its first token may be the one that stood there.
    """
    numbers = np.where(np.isfinite(log_probs), log_probs, 1.0)  # no log-probability is 1
    unknown = np.ones((1, len(canvas)))
    surer = np.diff(numbers, axis=0, prepend=unknown) != 0
    return surer | (np.diff(tokens, axis=0, prepend=canvas[None]) != 0)


def page_data(replay: Replay) -> dict[str, Any]:
    """All that the page's script needs, as JSON."""
    return {
        "settings": list(replay.settings.items()),
        "pieces": {str(token): text for token, text in replay.pieces.items()},
        "special": sorted(replay.special),
        "shift": replay.shift,
        "block": replay.block_length,
        "scenes": [_scene_data(scene) for scene in replay.scenes],
    }


def _scene_data(scene: Scene) -> dict[str, Any]:
    return {
        "canvas": np.where(scene.blank, -1, scene.canvas).tolist(),
        "start": scene.start,
        "first_block": scene.first_block,
        "full": scene.full_flops,
        "runs": [
            {
                "name": run.name,
                "end": scene.start + run.num_tokens,
                "layers": run.layers.shape[1],
                "totals": scene.totals(run),
                "calls": [_call_data(run, call) for call in range(run.nfe)],
            }
            for run in scene.runs
        ],
    }


def _call_data(run: ReplayRun, call: int) -> dict[str, Any]:
    """A call: tokens it wrote with their probabilities, layers, depths in runs, and its cost."""
    writes = [
        [int(at), int(run.tokens[call, at]), _probability(float(run.log_probs[call, at]))]
        for at in np.flatnonzero(run.written[call])
    ]
    depths = [[len(list(same)), int(depth)] for depth, same in groupby(run.depth[call])]
    return {
        "writes": writes,
        "layers": [round(float(x), 2) for x in run.layers[call]],
        "tokens": run.tokens_run[call].tolist(),
        "depths": depths,
        "flops": float(run.flops[call]),
        "model": run.letters[call : call + 1],
    }


def _probability(log_prob: float) -> float | None:
    return round(math.exp(log_prob), 4) if math.isfinite(log_prob) else None
