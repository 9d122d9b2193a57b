"""Studies of model schedules: which model takes which denoising steps, and what that costs.

Every class here is one kind of study; `eval.py` runs the one that a configuration file returns.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb
from typing import ClassVar, Literal

from dials_jax.config.data import Data
from dials_jax.config.model import Layout, MeshConfig, WeightDtype
from dials_jax.config.typed import Place, Seed, Typed, require_positive
from dials_jax.errors import require

MOST_SCHEDULES = 10_000  # of a search that tries all: every one draws and scores its samples


def _require_letters(models: tuple[tuple[str, str], ...]) -> None:
    letters = [letter for letter, _ in models]
    require(bool(letters), "models is empty; give letters and paths, such as H runs/mdlm/12")
    require(
        len(set(letters)) == len(letters),
        f"models: letters {', '.join(letters)} name one twice; give each model its own",
    )


def _require_known(letters: tuple[str, ...], models: tuple[tuple[str, str], ...]) -> None:
    known = [letter for letter, _ in models]
    for letter in letters:
        require(letter in known, f"no model is called {letter!r}; models has {', '.join(known)}")


@dataclass(frozen=True, kw_only=True)
class SamplingStudy(Typed):
    """Settings of the studies that sample unconditionally and score by generative perplexity."""

    RENAMED: ClassVar[dict[str, str]] = {"static": "static_layers"}

    models: tuple[tuple[str, Place], ...]  # letter and path of each; two may have one path
    scorer: Place  # path of a causal model
    samples: Place = (
        ""  # workdir of an earlier study whose samples are scored; empty: new ones are drawn
    )
    static_layers: tuple[tuple[str, str], ...] = ()  # letter, layers it skips: ("L", "3,7")
    length: int = 1024
    steps: int = 1000
    num_samples: int = 1600  # sample i has the same key under every schedule
    batch_size: int = 16
    precision: Literal["exact", "float32"] = "exact"  # float32: as published numbers were made
    retokenize: Literal["auto", "always", "never"] = "auto"  # auto: where tokenizers differ
    score_length: int = 1024  # tokens of a sample that the scorer reads
    aggregate: Literal["mean", "corpus"] = "mean"  # the perplexity that tables compare
    dtype: WeightDtype | None = "bfloat16"  # of the samplers; the scorer is float32
    layout: Layout = "auto"
    mesh: MeshConfig = MeshConfig()
    seed: Seed = 0

    def __post_init__(self):
        super().__post_init__()
        _require_letters(self.models)
        require(bool(self.scorer), "scorer is missing; give the folder of a causal model")
        _require_known(tuple(letter for letter, _ in self.static_layers), self.models)
        for letter, layers in self.static_layers:
            numbers = layers.replace(" ", "").split(",")
            require(
                all(n.isdecimal() for n in numbers),
                f"static_layers: {layers!r} of {letter} are no layers; give numbers such as 3,7",
            )
        require_positive(self, "length", "steps", "batch_size")
        require(self.num_samples > 1, f"num_samples={self.num_samples}: an interval needs two")
        require(self.score_length > 1, f"score_length={self.score_length}: a score needs two")


@dataclass(frozen=True, kw_only=True)
class ScheduleStudy(SamplingStudy):
    """Compares given schedules (Sedykh, figures 1 and 8 to 11, tables 1 and 2).

    The first schedule is the baseline of every comparison.
    """

    schedules: tuple[str, ...]  # such as H1000 or L125,H750,L125
    figure: Literal["schedules", "fractions"] = (
        "schedules"  # fractions: against the share of light steps
    )

    def __post_init__(self):
        super().__post_init__()
        require(bool(self.schedules), "schedules is empty; give some, such as H1000")
        require(
            len(set(self.schedules)) == len(self.schedules), "schedules names one twice; remove it"
        )


@dataclass(frozen=True, kw_only=True)
class SearchStudy(SamplingStudy):
    """Searches schedules of equal segments, some of them light (Sedykh, sections 3.3 and 4.2)."""

    RENAMED: ClassVar[dict[str, str]] = {"static": "static_layers", "top": "num_extremes"}

    num_samples: int = 160
    heavy: str = "H"
    light: str = "L"
    num_segments: int = 10
    num_light: int = 4
    num_extremes: int = 20  # best, and worst, schedules whose segments are counted
    budget: int | None = None  # try this many, each chosen by the trials before it; None: all
    importance: Place = ""  # workdir of an ImportanceStudy that says where a budget starts

    def __post_init__(self):
        super().__post_init__()
        _require_known((self.heavy, self.light), self.models)
        require(
            self.heavy != self.light,
            f"heavy and light are both {self.heavy!r}; give each its letter",
        )
        require(
            0 < self.num_light < self.num_segments,
            f"num_light={self.num_light} must lie between 0 and num_segments={self.num_segments}",
        )
        require(
            self.steps % self.num_segments == 0,
            f"steps={self.steps} do not split into {self.num_segments} equal segments; "
            "make steps a multiple of num_segments",
        )
        require_positive(self, "num_extremes")
        require(
            self.budget is not None or self.num_schedules <= MOST_SCHEDULES,
            f"{self.num_schedules:,} schedules are too many to try all; give a budget, or lower "
            "num_segments",
        )
        require(
            self.budget is None or 0 < self.budget <= self.num_schedules,
            f"budget={self.budget} must lie in 1 to {self.num_schedules}, the number of schedules",
        )
        require(
            self.budget is None or not self.samples,
            "samples: a search with a budget draws what its scorer asks for; leave out one of them",
        )
        require(
            self.budget is not None or not self.importance,
            "importance is for a search with a budget; a full one tries every schedule",
        )

    @property
    def num_schedules(self) -> int:
        return comb(self.num_segments, self.num_light)


@dataclass(frozen=True, kw_only=True)
class ImportanceStudy(Typed):
    """How far light models are from a heavy one at each noise level (Sedykh, section 4.1)."""

    RENAMED: ClassVar[dict[str, str]] = {"heavy2": "second_heavy"}

    models: tuple[tuple[str, Place], ...]
    heavy: str = "H"
    second_heavy: str = (
        ""  # letter of another seed of the heavy model: the baseline of the divergence
    )
    data: Data
    schedules: tuple[str, ...] = ()  # whose loss is predicted, without sampling
    num_times: int = 20  # midpoints of this many equal parts of (0, 1)
    num_sequences: int = 500
    batch_size: int = 16
    dtype: WeightDtype | None = "float32"
    layout: Layout = "auto"
    mesh: MeshConfig = MeshConfig()
    seed: Seed = 0

    def __post_init__(self):
        super().__post_init__()
        _require_letters(self.models)
        _require_known(
            (self.heavy, *((self.second_heavy,) if self.second_heavy else ())), self.models
        )
        require(
            self.heavy != self.second_heavy,
            f"heavy and second_heavy are both {self.heavy!r}; give each its letter",
        )
        require_positive(self, "num_times", "batch_size")
        require(
            self.num_sequences > 1, f"num_sequences={self.num_sequences}: an interval needs two"
        )
        require(
            {letter for letter, _ in self.models} > {self.heavy, self.second_heavy} - {""},
            "models names no light model; add one to compare with the heavy one",
        )

    @property
    def light(self) -> tuple[str, ...]:
        return tuple(
            letter for letter, _ in self.models if letter not in (self.heavy, self.second_heavy)
        )

    @property
    def times(self) -> tuple[float, ...]:
        return tuple((i + 0.5) / self.num_times for i in range(self.num_times))


@dataclass(frozen=True, kw_only=True)
class ProposeStudy(Typed):
    """How many trials it takes to find a good schedule, replayed on a finished search."""

    search: Place  # workdir of a SearchStudy
    importance: Place = ""  # workdir of an ImportanceStudy; empty: only methods that measure
    budgets: tuple[int, ...] = (1, 5, 10, 20, 40, 80)  # schedules tried
    num_repeats: int = 100  # random halves of the samples, and random orders of trying
    seed: Seed = 0

    def __post_init__(self):
        super().__post_init__()
        require(bool(self.search), "search is missing; give the workdir of a finished search")
        require(bool(self.budgets), "budgets is empty; give numbers of schedules to try")
        require(all(b > 0 for b in self.budgets), f"budgets {self.budgets} must all be positive")
        require_positive(self, "num_repeats")


StudyConfig = ScheduleStudy | SearchStudy | ImportanceStudy | ProposeStudy
