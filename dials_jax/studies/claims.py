"""The claims of Goel et al. as numbers of profiles, with 95 % intervals over sequences.

Positive numbers speak for a claim. All models of a study continue the same prompts in the same
order, so two models are compared sequence by sequence. Depth profiles are [N, L], of layers, or
[N, L+1], of hidden states: `Profile.sequence_layer`, `Profile.sequence_token` and
`Profile.end_token`. Neighbouring [MASK] have one embedding and are alike whatever the model, so
what is said of neighbouring tokens must hold in the last model calls too, where neither they nor
repeated tokens count.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Float

from dials_jax.errors import nearest, require
from dials_jax.statistics import mean_interval
from dials_jax.studies.profile import Profile

AT_END = " in the last model call"
_Role = Literal["native", "causal", "adapted"]
Verdict = Literal["supported", "not supported", "undecided", "not tested"]
NUM_RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """One number that speaks for a claim where it is positive, and its 95 % interval."""

    what: str
    value: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """1 or -1 where the interval leaves out 0, else 0."""
        return int(self.low > 0) - int(self.high < 0)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What the paper says, and what speaks for it or against it."""

    title: str
    sentence: str
    needs: str  # without which models there is no evidence
    evidence: tuple[Evidence, ...]
    untested: str = ""  # a part of the sentence that the evidence says nothing about

    @property
    def verdict(self) -> Verdict:
        return judge(self.evidence)


def judge(evidence: Iterable[Evidence]) -> Verdict:
    """Supported: every interval lies above 0. Not supported: one lies below 0."""
    signs = {number.sign for number in evidence}
    if not signs:
        return "not tested"
    if -1 in signs:
        return "not supported"
    return "supported" if signs == {1} else "undecided"


# --------------------------------------------------------------------------- numbers a sequence


def early_layers(num_layers: int) -> slice:
    """The first half without layer 0, whose input is an embedding; the late ones follow."""
    return slice(1, max(2, num_layers // 2))


def early_excess(layer: Float[np.ndarray, "N L"]) -> Float[np.ndarray, "N"]:
    """How much more similar input and output of early layers are than those of late ones.

    Raises: InputError for fewer than 3 layers, which have no early and late ones.
    """
    early = early_layers(layer.shape[1])
    require(
        layer.shape[1] > 2,
        f"a profile of {layer.shape[1]} layers has no early and late ones; give a deeper model",
    )
    return layer[:, early].mean(axis=1) - layer[:, early.stop :].mean(axis=1)


def recency(token: Float[np.ndarray, "N states"]) -> Float[np.ndarray, "N"]:
    """1 - cosine of neighbouring tokens, over all hidden states but the embedding."""
    return 1 - token[:, 1:].mean(axis=1)


def recency_growth(token: Float[np.ndarray, "N states"]) -> Float[np.ndarray, "N"]:
    """How much larger it is in the second half of the depth than in the first."""
    half = 1 + token.shape[1] // 2
    return token[:, 1:half].mean(axis=1) - token[:, half:].mean(axis=1)


def resample_depth(profile: Float[np.ndarray, "N L"], count: int) -> Float[np.ndarray, "N M"]:
    """A depth profile at `count` equally spaced depths, the first and the last one included."""
    old, new = np.linspace(0, 1, profile.shape[1]), np.linspace(0, 1, count)
    return np.array([np.interp(new, old, row) for row in profile])


def profile_distance(
    one: Float[np.ndarray, "N L"], two: Float[np.ndarray, "N L"]
) -> Float[np.ndarray, "N"]:
    """The root mean square difference of two profiles over the depth."""
    return np.sqrt(np.mean((one - two) ** 2, axis=1))


def profile_correlation(
    one: Float[np.ndarray, "*R L"], two: Float[np.ndarray, "*R L"]
) -> Float[np.ndarray, "*R"]:
    """Pearson's correlation of two profiles over the depth; NaN where one of them is constant."""
    a, b = (x - x.mean(axis=-1, keepdims=True) for x in (one, two))
    spread = np.sqrt((a**2).sum(axis=-1) * (b**2).sum(axis=-1))
    return np.where(spread > 0, (a * b).sum(axis=-1) / np.where(spread > 0, spread, 1), np.nan)


# --------------------------------------------------------------------------------------- evidence


def mean_evidence(what: str, values: Float[np.ndarray, "N"]) -> Evidence:
    """The mean of one number per sequence. NaN: the sequence has none."""
    values = values[np.isfinite(values)]
    if not len(values):
        return Evidence(what=what, value=np.nan, low=np.nan, high=np.nan)
    low, high = mean_interval(values)
    return Evidence(what=what, value=float(values.mean()), low=low, high=high)


def nearer_by_correlation(
    what: str,
    adapted: Float[np.ndarray, "N L"],
    causal: Float[np.ndarray, "N L"],
    native: Float[np.ndarray, "N L"],
    seed: int = 0,
) -> Evidence:
    """The mean profile's correlation with the causal one, less that with the native one.

    The interval is a percentile bootstrap over sequences, the same ones for all three models: it
    covers what other prompts would change, not other layers or trainings (Efron 1979).
    """
    count = len(adapted)
    if not count:
        return mean_evidence(what, np.empty(0))
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(count, np.full(count, 1 / count), NUM_RESAMPLES) / count

    def difference(weights: Float[np.ndarray, "R N"]) -> Float[np.ndarray, "R"]:
        own, ar, other = (weights @ x for x in (adapted, causal, native))
        return profile_correlation(own, ar) - profile_correlation(own, other)

    (value,) = difference(np.full((1, count), 1 / count))
    drawn = difference(weights)
    low, high = (np.nan, np.nan)
    if count > 1 and np.isfinite(drawn).all():
        low, high = np.quantile(drawn, (0.025, 0.975))
    return Evidence(what=what, value=float(value), low=float(low), high=float(high))


def nearer_by_distance(
    what: str,
    adapted: Float[np.ndarray, "N L"],
    causal: Float[np.ndarray, "N L"],
    native: Float[np.ndarray, "N L"],
) -> Evidence:
    """The distance of the adapted profile to the native one, less that to the causal one."""
    return mean_evidence(
        what, profile_distance(adapted, native) - profile_distance(adapted, causal)
    )


# ------------------------------------------------------------------------------------ the claims


class Models:
    """The profiles of a study by what their models are.

    Args:
      adapted: labels of the diffusion models that continue a causal one (Dream).

    Raises: InputError for labels that are not there, an adapted model that is causal, and models
      that were measured on different numbers of sequences.
    """

    def __init__(self, profiles: Mapping[str, Profile], adapted: Collection[str] = ()):
        for label in adapted:
            require(
                label in profiles,
                f"adapted: no model is called {label!r}{nearest(label, profiles)}",
            )
            require(
                profiles[label].facts.family == "diffusion",
                f"adapted: {label!r} is a causal model; name diffusion models that continue one",
            )
        counts = {profile.num_sequences for profile in profiles.values()}
        require(
            len(counts) < 2,
            f"profiles of {', '.join(map(str, sorted(counts)))} sequences do not compare; measure "
            "all models on the same prompts",
        )
        self.profiles, self.adapted = profiles, tuple(adapted)

    def role(self, label: str) -> _Role:
        if label in self.adapted:
            return "adapted"
        return "causal" if self.profiles[label].facts.family == "causal" else "native"

    def layers(self, role: _Role) -> dict[str, Float[np.ndarray, "N L"]]:
        """Of each model, by label."""
        return {x: p.sequence_layer for x, p in self.profiles.items() if self.role(x) == role}

    def tokens(self, role: _Role) -> dict[str, Float[np.ndarray, "N states"]]:
        """Of each model, by label: neighbouring tokens over all model calls."""
        return {x: p.sequence_token for x, p in self.profiles.items() if self.role(x) == role}

    def ends(self, role: _Role) -> dict[str, Float[np.ndarray, "N states"]]:
        """Of each model, by label: neighbouring tokens in the last model call."""
        return {x: p.end_token for x, p in self.profiles.items() if self.role(x) == role}

    @cached_property
    def depth(self) -> int:
        """Layers of the deepest model: others are compared at the same relative depths."""
        return max(profile.num_layers for profile in self.profiles.values())


def check_claims(
    profiles: Mapping[str, Profile], adapted: Collection[str] = ()
) -> tuple[Claim, ...]:
    """The paper's three claims, and the evidence that these models give.

    Args:
      profiles: by label.
      adapted: labels of the diffusion models that continue a causal one.
    """
    models = Models(profiles, adapted)
    return (
        Claim(
            title="Early layers of native diffusion models are redundant",
            sentence="In a native diffusion model the early layers change their input less than "
            "the late ones, and more so than in a causal model.",
            needs="a native diffusion model of at least 3 layers",
            evidence=tuple(_redundancy(models)),
            untested="" if models.layers("causal") else "the comparison with a causal model",
        ),
        Claim(
            title="Causal models have a recency bias",
            sentence="In a causal model neighbouring tokens differ more than in a native diffusion "
            "model, where they come to differ in the late layers.",
            needs="a causal and a native diffusion model",
            evidence=tuple(_recency_bias(models)),
        ),
        Claim(
            title="Adapted models keep the causal structure",
            sentence="The depth profile of a diffusion model that continues a causal one is nearer "
            "to that of a causal model than to that of a native diffusion model.",
            needs="an adapted, a causal and a native diffusion model",
            evidence=tuple(_kept_structure(models)),
        ),
    )


def _redundancy(models: Models) -> Iterator[Evidence]:
    """Of native models, alone and against causal ones."""
    excess = {
        role: {x: early_excess(p) for x, p in models.layers(role).items() if p.shape[1] > 2}
        for role in ("native", "causal")
    }
    for native, own in excess["native"].items():
        yield mean_evidence(f"{native}: cosine of early layers less that of late ones", own)
        for causal, other in excess["causal"].items():
            yield mean_evidence(f"the same, {native} less {causal}", own - other)


def _recency_bias(models: Models) -> Iterator[Evidence]:
    """Of causal models against native ones, and of native ones alone."""
    for when, tokens in (("", models.tokens), (AT_END, models.ends)):
        native, causal = tokens("native"), tokens("causal")
        what = f"1 - cosine of neighbouring tokens{when}"
        for label, own in native.items() if causal else ():
            for other, theirs in causal.items():
                yield mean_evidence(f"{what}, {other} less {label}", recency(theirs) - recency(own))
            yield mean_evidence(
                f"{label}: {what}, late states less early ones", recency_growth(own)
            )


def _kept_structure(models: Models) -> Iterator[Evidence]:
    """Of each adapted model against each pair of a causal and a native one."""
    neighbours = "cosines of neighbouring tokens"
    profiles = {
        "layer cosines": models.layers,
        neighbours: models.tokens,
        f"{neighbours}{AT_END}": models.ends,
    }
    for what, of_role in profiles.items():
        own, causal, native = (
            # The first number is of the embedding; it would outweigh the rest.
            {x: resample_depth(p[:, 1:], models.depth) for x, p in of_role(role).items()}
            for role in ("adapted", "causal", "native")
        )
        for label, one, two in itertools.product(own, causal, native):
            three = with_numbers(own[label], causal[one], native[two])
            compared = f"{label}, {what}:"
            yield nearer_by_correlation(
                f"{compared} correlation with {one} less that with {two}", *three
            )
            yield nearer_by_distance(f"{compared} distance to {two} less that to {one}", *three)


def with_numbers(*profiles: Float[np.ndarray, "N L"]) -> list[Float[np.ndarray, "M L"]]:
    """The sequences that have all numbers in every profile."""
    here = np.isfinite(profiles).all(axis=(0, 2))
    return [profile[here] for profile in profiles]
