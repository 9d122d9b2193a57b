"""Settings of an evaluation sweep: its tasks, and the policies that are compared on them.

`dials_jax.config` exports `EvalConfig` and `EvalTask`, too. They are defined here because a task
holds a sampler and a cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from dials_jax.caching.early_skip.settings import EarlySkip
from dials_jax.caching.plain import DualCache, PrefixCache
from dials_jax.config import Data, MeshConfig, Seed, Typed, Votes, WeightDtype, require_positive
from dials_jax.errors import require
from dials_jax.sampling.ancestral import Ancestral
from dials_jax.sampling.autoregressive import Autoregressive
from dials_jax.sampling.confidence import Confidence
from dials_jax.sampling.dream import Dream

SamplerConfig = Confidence | Dream | Ancestral | Autoregressive
CacheConfig = PrefixCache | DualCache | EarlySkip

# Fields of a task that decide how sequences are padded: cost depends on them, scores do not.
PADDING_FIELDS = ("bucket", "max_programs")
# Fields of a sweep that decide which layers static policies skip.
STATIC_FIELDS = ("similarity_threshold", "num_calibration")
# Fields of a task that only one kind of metric reads; setting them for another is refused.
_OF_GENERATION = ("match", "until", "sampler", "cache")
_OF_LIKELIHOOD = ("cfg_scale",)


@dataclass(frozen=True, kw_only=True)
class EvalTask(Typed):
    """One evaluation task: data, the metric that scores its items, and how texts are generated."""

    # Fields of earlier versions, and the sampler's fields that replace them.
    RENAMED: ClassVar[dict[str, str]] = {
        "gen_length": "sampler.gen_length",
        "block_length": "sampler.block_length",
        "steps": "sampler.steps",
        "temperature": "sampler.temperature",
        "threshold": "sampler.threshold",
        "factor": "sampler.factor",
        "delay_eos": "sampler.delay_eos",
        "stop_at_eos": "sampler.stop_at_eos",
        "alg": "sampler.alg",
        "alg_temp": "sampler.alg_temp",
        "top_p": "sampler.top_p",
        "top_k": "sampler.top_k",
    }

    name: str
    metric: Literal["exact_match", "choice", "nelbo"]
    data: Data
    choices: tuple[str, ...] = ()  # templates, one per choice ("{sol1}", "{sol2}")
    choice_list: str = ""  # or one field that holds a list ("choices.text")
    label: str = "label"  # field with the index or the name of the right choice
    label_names: str = ""  # field that lists the choices' names ("choices.label")
    extract: str = ""  # regular expression that finds the answer in output and reference
    match: Literal["first", "last"] | None = None  # None: the first; references have only one
    until: tuple[str, ...] = ()  # stop strings: the output is cut at the first one (exact_match)
    limit: int | None = None  # first items only
    # How texts are generated (exact_match). None: Confidence, for data.answer_length tokens in one
    # block, one token per step.
    sampler: SamplerConfig | None = None
    cache: CacheConfig | None = None  # (exact_match)
    num_samples: int = 128  # Monte-Carlo masks per item (choice, nelbo)
    cfg_scale: float = 0.0  # guidance of likelihoods (choice, nelbo); samplers have their own
    bucket: int = 64  # lengths are padded to multiples of this
    max_programs: int = 4  # the largest number of padded lengths, each of which is compiled

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "num_samples", "bucket", "max_programs")
        require(
            self.limit is None or self.limit > 0,
            f"task {self.name!r}: limit={self.limit} must be positive, or None",
        )
        require(
            all(self.until), f"task {self.name!r}: until={self.until} has an empty text; remove it"
        )
        require(
            len(self.choices) != 1 and len(set(self.choices)) == len(self.choices),
            f"task {self.name!r}: choices={self.choices} must be several, and all different",
        )
        if self.metric == "exact_match":
            self._require_unset(
                _OF_LIKELIHOOD,
                "is of likelihoods; set it in the sampler, as Confidence(cfg_scale=)",
            )
        else:
            why = f"is for generation, but metric {self.metric!r} generates nothing; leave it out"
            self._require_unset(_OF_GENERATION, why)

    def _require_unset(self, names: tuple[str, ...], why: str) -> None:
        for name in names:
            value, default = getattr(self, name), self.__dataclass_fields__[name].default
            require(value == default, f"task {self.name!r}: {name}={value!r} {why}")


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Typed):
    """A sweep of policies over tasks."""

    RENAMED: ClassVar[dict[str, str]] = {
        "static": "num_static",
        "random": "num_random",
        "threshold": "skip_threshold",
    }

    model: str
    routers: tuple[str, ...] = ()  # workdirs of router training, one per lambda
    tasks: tuple[EvalTask, ...] = ()
    num_static: tuple[int, ...] = (1, 2, 3, 4)  # how many layers to skip; which: Goel, Algorithm 1
    num_random: tuple[int, ...] = (1, 2, 3, 4)
    similarity_threshold: float | None = None  # tau of Goel, Algorithm 1 (0.95 there)
    num_calibration: int = 64  # prompts whose similarities choose the static layers
    # tau in place of the routers' own; of several, each is a policy of its own.
    skip_threshold: float | tuple[float, ...] | None = None
    execution_ratios: tuple[
        float, ...
    ] = ()  # also with thresholds fitted to these shares of layers
    votes: Votes | None = None  # in place of the routers' own; fitted thresholds have theirs
    batch_size: int = 32
    mesh: MeshConfig = MeshConfig()
    layout: Literal["stacked", "unrolled", "fused", "auto"] = (
        "stacked"  # stacked compiles much faster
    )
    dtype: WeightDtype | None = None
    seed: Seed = 0

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "num_calibration", "batch_size")
        taus = self.skip_threshold if isinstance(self.skip_threshold, tuple) else ()
        for tau in taus or (self.skip_threshold or 0.0,):
            require(0 <= tau < 1, f"skip_threshold={tau} must lie in [0, 1)")
