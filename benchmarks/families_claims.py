"""Goel's claims as numbers over the results of `benchmarks.families`, with intervals.

The numbers are those of `dials_jax.studies.claims`, per sequence, so families and steps are
compared on the same prompts. Here their value is the mean over seeds and sequences. The interval
covers both: variances are added, and what little two seeds tell of their spread makes it wide
(Welch and Satterthwaite).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from dials_jax.statistics import (
    RankCorrelation,
    combined_interval,
    mean_and_stderr,
    rank_correlation,
)
from dials_jax.studies.claims import (
    AT_END,
    Evidence,
    early_excess,
    profile_distance,
    recency,
    recency_growth,
)

Row = dict[str, Any]
FAMILIES = ("native", "causal", "continued")
PROFILES = {
    "layer": "layer cosines",
    "token": "cosines of neighbouring tokens",
    "end": f"cosines of neighbouring tokens{AT_END}",
}
ALGORITHM_1 = "similarity in prompts (Algorithm 1), and loss"


@dataclass(frozen=True, kw_only=True)
class Finding(Evidence):
    """One number over seeds and sequences, and its value of each seed."""

    by_seed: tuple[float, ...]

    def __str__(self) -> str:
        if not self.by_seed:
            return "no sequence has this number in all seeds"
        seeds = ", ".join(f"{value:+.4f}" for value in self.by_seed)
        return f"{self.value:+.4f} [{self.low:+.4f}, {self.high:+.4f}] ({seeds})"


def find(what: str, by_seed: Sequence[Float[np.ndarray, "N"]]) -> Finding:
    """Args: by_seed: the number of every sequence, for each seed. NaN: it has none."""
    per_sequence = np.mean(by_seed, axis=0)
    per_sequence = per_sequence[np.isfinite(per_sequence)]
    if not len(per_sequence):
        return Finding(what=what, value=np.nan, low=np.nan, high=np.nan, by_seed=())
    value, stderr = mean_and_stderr(per_sequence)
    sources = [(stderr, len(per_sequence) - 1)]
    means = tuple(float(np.nanmean(values)) for values in by_seed)
    if len(means) > 1:
        sources.append((mean_and_stderr(means)[1], len(means) - 1))
    low, high = combined_interval(value, sources)
    return Finding(what=what, value=value, low=low, high=high, by_seed=means)


class Results:
    """The rows of a results file, by what they are of."""

    def __init__(self, results: Row):
        self.settings, self.machine = results["settings"], results["machine"]
        self.plan = results["plan"]
        self._rows = {name: results[name] for name in ("trainings", "losses", "profiles")}
        self.sizes = list(dict.fromkeys(row["size"] for row in self._rows["trainings"]))
        self.seeds = list(dict.fromkeys(row["seed"] for row in self._rows["trainings"]))

    def of(self, part: str, **facts: Any) -> list[Row]:
        return [row for row in self._rows[part] if all(row[k] == x for k, x in facts.items())]

    def steps(self, size: str, family: str) -> list[int]:
        """The steps of a family's own training of which there are profiles."""
        return sorted({row["step"] for row in self.of("profiles", size=size, family=family)})

    def profiles(self, size: str, family: str, step: int | None = None) -> list[Row]:
        """One per seed. Args: step: None: the finished model."""
        step = self.steps(size, family)[-1] if step is None else step
        return self.of("profiles", size=size, family=family, step=step)

    def by_sequence(
        self, name: str, size: str, family: str, step: int | None = None
    ) -> list[Float[np.ndarray, "N L"]]:
        return [np.array(row[name], float) for row in self.profiles(size, family, step)]


# --------------------------------------------------------------------------------------- numbers


def nearer_causal(results: Results, name: str, size: str, step: int | None = None) -> Finding:
    """How much nearer the continued model's profile is to the causal one's than to the native's.

    Args:
      name: "layer", "token", or "end"; their first number, of the embedding, is left out.
      step: of the continued model; the others are finished.
    """
    own = results.by_sequence(name, size, "continued", step)
    native, causal = (results.by_sequence(name, size, family) for family in ("native", "causal"))
    differences = [
        profile_distance(x[:, 1:], y[:, 1:]) - profile_distance(x[:, 1:], z[:, 1:])
        for x, y, z in zip(own, native, causal, strict=True)
    ]
    return find(f"continued, {PROFILES[name]}: distance to native less that to causal", differences)


def claim_findings(results: Results, size: str) -> dict[str, tuple[Finding, ...]]:
    """What speaks for each claim where it is positive."""
    excess = {
        family: [early_excess(x) for x in results.by_sequence("layer", size, family)]
        for family in ("native", "causal")
    }
    return {
        "early layers of native diffusion are redundant": (
            find("native: cosine of early layers less that of late ones", excess["native"]),
            find("the same, native less causal", np.subtract(excess["native"], excess["causal"])),
        ),
        "causal models have a recency bias": tuple(
            found
            for name, when in (("token", ""), ("end", AT_END))
            for found in recency_findings(results, size, name, when)
        ),
        "the continued model keeps the causal structure": tuple(
            nearer_causal(results, name, size) for name in PROFILES
        ),
    }


def recency_findings(results: Results, size: str, name: str, when: str) -> Iterator[Finding]:
    """Args: name: "token", or "end", where no mask makes neighbours alike."""
    native, causal = (results.by_sequence(name, size, family) for family in ("native", "causal"))
    what = f"1 - cosine of neighbouring tokens{when}"
    differences = [recency(x) - recency(y) for x, y in zip(causal, native, strict=True)]
    yield find(f"{what}, causal less native", differences)
    yield find(f"native: {what}, late states less early ones", [recency_growth(x) for x in native])


# ------------------------------------------------------------------------------------ retention


class Retained(NamedTuple):
    """What the k layers of Algorithm 1 cost in one family."""

    cost: Finding  # nats per token more than the full model's
    layers: list[list[int]]  # of each seed


def retained(results: Results, size: str, family: str) -> dict[bool, dict[int, Retained]]:
    """By whether neighbours may be chosen, then by k, where every seed has so many layers."""
    found: dict[bool, dict[int, Retained]] = {False: {}, True: {}}
    by_seed = results.of("losses", size=size, family=family)
    kinds = {(run["adjacent"], run["k"]) for row in by_seed for run in row["chosen"]}
    for adjacent, k in sorted(kinds):
        runs = [
            (run, np.array(run["nats"]) - np.array(row["full"]))
            for row in by_seed
            for run in row["chosen"]
            if (run["adjacent"], run["k"]) == (adjacent, k)
        ]
        if len(runs) == len(by_seed):
            cost = find(f"k={k}", [more for _, more in runs])
            found[adjacent][k] = Retained(cost, [run["layers"] for run, _ in runs])
    return found


def kept_likelihood(cost: Finding) -> tuple[float, float, float]:
    """The share of a token's likelihood that is left, exp(-cost), and its interval."""
    return tuple(math.exp(-nats) for nats in (cost.value, cost.high, cost.low))


# ------------------------------------------------------------------------------------- skipping


def increases(row: Row) -> Float[np.ndarray, "M L"]:
    """Nats per token that leaving out a layer costs, per text."""
    return (np.array(row["without"]) - np.array(row["full"])).T


def correlations(
    results: Results, size: str, family: str
) -> Iterator[tuple[int, str, RankCorrelation]]:
    """Rank correlations over the layers; 1: the more similar, the cheaper to leave out."""
    for profile in results.profiles(size, family):
        seed = profile["seed"]
        (losses,) = results.of("losses", size=size, family=family, seed=seed)
        cheap = -increases(losses)
        prompts, answers = (_complete(profile[name]) for name in ("prompt_layer", "layer"))
        yield seed, ALGORITHM_1, rank_correlation(prompts, cheap)
        yield seed, "similarity in answers, and loss", rank_correlation(answers, cheap)
        for label, routed in losses["routed"].items():
            if "fitted" in label:
                skips = np.array(routed["skips"])[None]
                yield seed, "similarity in prompts, and routers", rank_correlation(prompts, skips)
                yield seed, "loss, and routers", rank_correlation(cheap, skips)


def _complete(values: Sequence[Sequence[float | None]]) -> Float[np.ndarray, "N L"]:
    """The sequences that have a number of every layer."""
    array = np.array(values, float)
    return array[np.isfinite(array).all(axis=1)]
