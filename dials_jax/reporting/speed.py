"""How fast sequences are generated, in passes, and what speed costs in accuracy.

Tasks that ask the same items and differ in how fast their samplers reveal tokens make a curve: its
points are the runs of one rule (`threshold`, `entropy_bound`, ...) with several values. Curves of
several rules, policies and caches are compared by their area: d3LLM's accuracy under parallelism.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from dials_jax.sampling.confidence import PARALLEL_RULES

# Metrics with scores of 0 or 1; others are real numbers.
ACCURACIES = ("exact_match", "code", "choice")
PENALTY = 3.0  # alpha of d3LLM's weight
MAX_LOSS = 5.0  # percent below the slowest point: what is worse is left out

SweepRun = Mapping[str, Any]


def pass_columns(run: SweepRun) -> dict[str, float | None]:
    """Passes per sequence, tokens per pass, and passes a second; None if not recorded."""
    counts, seconds = run.get("passes", {}), run["flops"]["seconds"]
    if not counts or len(counts) < len(run["items"]):  # all or a part is of an earlier version
        return dict.fromkeys(("nfe", "tokens_per_pass", "passes_per_second"))
    passes, tokens = (sum(numbers) for numbers in zip(*counts.values(), strict=True))
    return {
        "nfe": passes / len(counts),
        "tokens_per_pass": tokens / passes,
        "passes_per_second": run["num_calls"] / seconds if seconds else None,
    }


class SpeedCurve(NamedTuple):
    """Runs that differ in the value of one rule only."""

    label: str
    runs: tuple[SweepRun, ...]  # by rising tokens per pass
    aup: float  # accuracy under parallelism


def find_curves(runs: Sequence[SweepRun]) -> dict[str, list[SpeedCurve]]:
    """Finds the curves of accuracy against tokens per pass, by a title of the items they ask.

    Items that no rule was tried on with several values have none.
    """
    groups: dict[Any, list[SweepRun]] = {}
    for run in runs:
        if run["metric"] in ACCURACIES and pass_columns(run)["nfe"] is not None:
            groups.setdefault((run["metric"], frozenset(run["items"])), []).append(run)
    found = {}
    for group in groups.values():
        curves = _curves(group)
        if any(len(curve.runs) > 1 for curve in curves):
            title = _shared_words([run["task"] for run in group])
            found[title if title not in found else group[0]["task"]] = curves
    return found


def _shared_words(names: Sequence[str]) -> str:
    """The words that all names begin with; the first name where they share none."""
    columns = zip(*(name.split() for name in names), strict=False)
    shared = [words[0] for words in takewhile(lambda words: len(set(words)) == 1, columns)]
    return " ".join(shared).rstrip(" ,:;") or names[0]


def _curves(group: Sequence[SweepRun]) -> list[SpeedCurve]:
    """The curves among runs of the same items."""
    facts = [_other_settings(run) for run in group]
    names = [name for name in dict.fromkeys(n for own in facts for n in own) if name != "rule"]
    telling = [name for name in names if len({json.dumps(own.get(name)) for own in facts}) > 1]
    members: dict[str, list[int]] = {}
    for number, own in enumerate(facts):
        members.setdefault(json.dumps(own, sort_keys=True), []).append(number)
    best = max(map(_percent, group))
    curves = []
    for numbers in members.values():
        own = facts[numbers[0]]
        shown = [f"{name} {own[name]}" for name in telling if name in own and name != "policy"]
        policy = [own["policy"]] if "policy" in telling else []
        line = sorted((group[i] for i in numbers), key=tokens_per_pass)
        points = [(tokens_per_pass(run), _percent(run)) for run in line]
        label = ", ".join([own["rule"], *shown, *policy])
        curves.append(SpeedCurve(label, tuple(line), accuracy_under_parallelism(points, best)))
    return curves


def _other_settings(run: SweepRun) -> dict[str, Any]:
    """What is equal along a curve: the policy, the rule's name, and all but the rule's value."""
    generation = run["generation"]
    settings = {
        name: value
        for name, value in generation.items()
        if name not in (_rule(run), "steps") and value is not None and value is not False
    }
    return {"rule": _rule(run), **settings, "policy": run["policy"]["label"]}


def _rule(run: SweepRun) -> str:
    """The setting that decides how many tokens a step reveals."""
    given = (name for name in PARALLEL_RULES if run["generation"].get(name) is not None)
    return next(given, "steps")


def rule_value(run: SweepRun) -> str:
    """The value of the setting that runs of a curve differ in, as text."""
    value = run["generation"].get(_rule(run))
    return "" if value is None else f"{value:g}"


def tokens_per_pass(run: SweepRun) -> float:
    return pass_columns(run)["tokens_per_pass"]


def _percent(run: SweepRun) -> float:
    return 100 * sum(run["items"].values()) / len(run["items"])


def accuracy_under_parallelism(points: Sequence[tuple[float, float]], best: float) -> float:
    """The area under accuracy (percent) over tokens per pass, where inaccuracy is penalised.

    Over points (x, y) of rising x, without those of y < y_1 - 5, it is x_1 y_1 plus the area of the
    trapezoids under y W(y), for W(y) = min(1, exp(-3 (1 - y / best))).

    Args:
      points: tokens per pass and accuracy, by rising tokens per pass.
      best: the highest accuracy that any method reaches on these items, in percent.

    Source: d3LLM (Qian et al. 2026, arXiv 2601.07568), and `get_aup` of its published code, which
      refuses a curve whose last point is left out.
    """
    x, y = np.array(points, float).T
    kept = y >= y[0] - MAX_LOSS
    x, y = x[kept], y[kept]
    return float(x[0] * y[0] + _area(x, y * _weight(y, best)))


def _weight(y: Float[np.ndarray, "n"], best: float) -> Float[np.ndarray, "n"]:
    return np.minimum(1.0, np.exp(-PENALTY * (1 - y / best))) if best > 0 else np.ones_like(y)


def _area(x: Float[np.ndarray, "n"], y: Float[np.ndarray, "n"]) -> float:
    return float(np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2))
