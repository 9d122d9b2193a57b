"""The profile of a model: what its hidden states look like along its own trajectories (Goel).

Everything here is NumPy in float64 on the host. The profiles of two batches merge into that of
both, so that a study is streamed and continued; `skipping/observing.py` measures.
"""

from __future__ import annotations

import dataclasses
import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from dials_jax.config import Typed, from_dict, to_dict
from dials_jax.errors import InputError, require
from dials_jax.files import replacing
from dials_jax.records import require_sound
from dials_jax.reporting.publish import file_name

PROFILES = "profiles"  # the folder of a study's workdir
REMEASURE = "delete it, and the study measures that model again"


@dataclass(frozen=True)
class Moments:
    """Mean and spread of many values, entry by entry of an array.

    Attributes:
      count: how many values an entry has seen.
      mean: NaN where the count is 0.
      m2: the sum of squared deviations from the mean.
    """

    count: Float[np.ndarray, "*shape"]
    mean: Float[np.ndarray, "*shape"]
    m2: Float[np.ndarray, "*shape"]

    @classmethod
    def of(cls, values: np.ndarray, axis: int | tuple[int, ...], where: Any = True) -> Moments:
        """Those of `values` over `axis`, all at once. Args: where: False leaves a value out."""
        values = np.asarray(values, float)
        ones = np.broadcast_to(np.asarray(where, float), values.shape)
        return cls(ones, values, np.zeros(values.shape)).pooled(axis)

    @classmethod
    def from_sums(cls, count: Any, mean: Any, m2: Any) -> Moments:
        """Those of an accumulator, whose mean may be anything where nothing was counted."""
        mean, m2 = np.asarray(mean, float), np.asarray(m2, float)
        count = np.array(np.broadcast_to(np.asarray(count, float), mean.shape))
        return cls(count, np.asarray(np.where(count > 0, mean, np.nan)), m2)

    def merge(self, other: Moments) -> Moments:
        """Those of both sets of values. Source: Chan, Golub and LeVeque (1979)."""
        both = zip(self._parts, other._parts, strict=True)
        return Moments(*(np.stack(pair) for pair in both)).pooled(0)

    def pooled(self, axis: int | tuple[int, ...]) -> Moments:
        """Those of all values along `axis`."""
        count = self.count.sum(axis)
        counted = np.where(self.count > 0, self.mean, 0.0)
        mean = (self.count * counted).sum(axis) / np.where(count > 0, count, 1)
        apart = counted - np.expand_dims(mean, axis)
        m2 = np.where(self.count > 0, self.m2 + self.count * apart**2, 0.0).sum(axis)
        return Moments.from_sums(count, mean, m2)

    @property
    def std(self) -> Float[np.ndarray, "*shape"]:
        """The sample standard deviation; NaN for fewer than two values."""
        variance = np.where(self.count > 1, self.m2, np.nan) / np.maximum(self.count - 1, 1)
        return np.asarray(np.sqrt(variance))

    @property
    def standard_error(self) -> Float[np.ndarray, "*shape"]:
        """Of the mean, if the values are independent: those of one step, not of several."""
        return np.asarray(self.std / np.sqrt(np.maximum(self.count, 1)))

    @property
    def _parts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.count, self.mean, self.m2


@dataclass(frozen=True, kw_only=True)
class ProfileFacts(Typed):
    """What a profile is of."""

    label: str
    path: str
    family: Literal["causal", "diffusion"]
    d_model: int
    sampler: str  # as Python writes it
    steps: int  # denoising steps; 1 of a causal model: one forward pass
    prompt_length: int  # padding included
    gen_length: int
    change_layers: tuple[int, ...]  # whose output `change` compares; layers count from 0
    sink_factor: float  # a sink's norm exceeds the median of its layer this many times
    fingerprint: str = ""  # of the weights
    prompts: str = ""  # digest of the prompts of the whole study


@dataclass(frozen=True)
class Profile:
    """What a model's hidden states look like at S groups of steps, over L layers and T positions.

    The hidden states are H_0, the embedding, to H_L, what leaves the last layer, before the final
    norm. Layer l from 0 takes H_l to H_l+1. Prompts are padded on the left, so an answer starts at
    the same position in every sequence. Only positions that hold a token count.

    Attributes:
      layer_cosine: [S, L, T], of H_l and H_l+1: Goel, Figures 4 and 5.
      token_cosine: [S, L+1, T-1], of positions i and i+1 in one hidden state: Goel, Figures 6 and 9
        to 14.
      norm: [S, L+1, T], the L2 norm: Goel, Figure 7.
      largest_norm: [L+1, T], over all sequences and steps.
      sinks: [L+1, T], how often a position's norm exceeded `sink_factor` times the median of its
        sequence, hidden state and call; `norm.count` summed over S is out of how many.
      layer_histogram, token_histogram: [L, bins] and [L+1, bins], of the cosines over [-1, 1].
      sequence_layer: [N, L], each sequence's mean layer cosine over its answer and its model calls.
      sequence_token: [N, L+1], the same of `token_cosine`: pairs inside the answer. NaN without a
        pair, as in an answer of one token.
      end_token: [N, L+1], the same in each sequence's last model call, of the pairs of two
        different tokens, neither a [MASK]. Masks and repeated tokens are alike whatever the model;
        masks are left where this call reveals tokens. NaN without a pair, as where one call
        reveals all.
      prompt_layer: [N, L], each prompt's mean layer cosine in the first call: Goel, Algorithm 1.
        NaN without a prompt.
      change: [K, D], 1 - cosine of a position's states in two calls of its sequence that follow
        each other, after each of `change_layers`, by signed distance to the nearest token that the
        former call revealed: see `distances`. Positions of the answer. Empty for causal models,
        whose states never change once they are there.
      seconds: measured, without compilation, the generation included.
    """

    facts: ProfileFacts
    layer_cosine: Moments
    token_cosine: Moments
    norm: Moments
    largest_norm: Float[np.ndarray, "states T"]
    sinks: Int[np.ndarray, "states T"]
    layer_histogram: Int[np.ndarray, "L bins"]
    token_histogram: Int[np.ndarray, "states bins"]
    sequence_layer: Float[np.ndarray, "N L"]
    sequence_token: Float[np.ndarray, "N states"]
    end_token: Float[np.ndarray, "N states"]
    prompt_layer: Float[np.ndarray, "N L"]
    change: Moments
    seconds: float = 0.0

    @property
    def num_layers(self) -> int:
        return self.layer_cosine.mean.shape[1]

    @property
    def num_bins(self) -> int:
        """Groups of steps: 1 where every sequence is looked at once."""
        return self.layer_cosine.mean.shape[0]

    @property
    def num_sequences(self) -> int:
        return len(self.sequence_layer)

    @staticmethod
    def over_sequences(values: Float[np.ndarray, "N L"]) -> Float[np.ndarray, "L"]:
        """The mean over the sequences that have a number; NaN without any."""
        return Moments.of(values, 0, np.isfinite(values)).mean

    @property
    def positions(self) -> Int[np.ndarray, "T"]:
        """Positions counted from the start of the answer; the prompt's are negative."""
        return np.arange(self.norm.mean.shape[-1]) - self.facts.prompt_length

    @property
    def distances(self) -> Int[np.ndarray, "D"]:
        """Position minus the nearest revealed one; the first and the last hold all beyond them."""
        count = self.change.mean.shape[1]
        return np.arange(count) - count // 2

    def merge(self, other: Profile) -> Profile:
        """That of the sequences of both, this one's first."""
        require(
            self.facts == other.facts,
            f"profiles {self.facts.label!r} and {other.facts.label!r} are of other models or "
            "settings; merge those of one study",
        )
        merged: dict[str, Any] = {"seconds": self.seconds + other.seconds}
        for names, merge in _MERGED.items():
            merged |= {name: merge(getattr(self, name), getattr(other, name)) for name in names}
        return dataclasses.replace(self, **merged)


_MOMENTS = ("layer_cosine", "token_cosine", "norm", "change")
_COUNTS = ("sinks", "layer_histogram", "token_histogram")
_SEQUENCES = ("sequence_layer", "sequence_token", "end_token", "prompt_layer")
_ARRAYS = ("largest_norm", *_COUNTS, *_SEQUENCES)
_MERGED: dict[tuple[str, ...], Callable[[Any, Any], Any]] = {
    _MOMENTS: Moments.merge,
    _COUNTS: np.add,
    _SEQUENCES: lambda one, two: np.concatenate([one, two]),
    ("largest_norm",): np.fmax,
}


def profile_path(workdir: str | Path, label: str) -> Path:
    return Path(workdir) / PROFILES / f"{file_name(label)}.npz"


def save_profile(profile: Profile, workdir: str | Path) -> Path:
    """Writes `profiles/LABEL.npz`, which replaces an earlier one once it is complete."""
    arrays: dict[str, Any] = {name: getattr(profile, name) for name in _ARRAYS}
    for name in _MOMENTS:
        moments = getattr(profile, name)
        arrays |= {f"{name}.{part.name}": getattr(moments, part.name) for part in _PARTS}
    facts = json.dumps(to_dict(profile.facts))
    path = profile_path(workdir, profile.facts.label)
    with replacing(path) as file:
        np.savez(file, **arrays, facts=np.array(facts), seconds=np.array(profile.seconds))
    return path


_PARTS = dataclasses.fields(Moments)


def load_profile(path: str | Path) -> Profile:
    """Reads what `save_profile` wrote. Raises: InputError for a missing or a damaged file."""
    path = Path(path)
    require(path.is_file(), f"{path} is missing; run the representation study that writes it")
    try:
        with np.load(path, allow_pickle=False) as stored:
            found = dict(stored)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is damaged ({error}); {REMEASURE}") from error
    require(
        "end_token" in found or "sequence_token" not in found,
        f"{path} is of an earlier version, which did not measure the last model call; {REMEASURE}",
    )
    with require_sound(path, REMEASURE):
        moments = {
            name: Moments(*(found[f"{name}.{part.name}"] for part in _PARTS)) for name in _MOMENTS
        }
        return Profile(
            facts=from_dict(ProfileFacts, json.loads(str(found["facts"]))),
            **moments,
            **{name: found[name] for name in _ARRAYS},
            seconds=float(found["seconds"]),
        )


def load_profiles(workdir: str | Path, labels: Sequence[str]) -> dict[str, Profile]:
    """The profiles of a study, by label."""
    return {label: load_profile(profile_path(workdir, label)) for label in labels}
