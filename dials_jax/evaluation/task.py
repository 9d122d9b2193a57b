"""Settings of an evaluation sweep: its tasks, and the policies that are compared on them.

`dials_jax.config` exports `EvalConfig` and `EvalTask`, too. They are defined here because a task
holds a sampler and a cache.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from dials_jax.caching.early_skip.settings import EarlySkip
from dials_jax.caching.plain import DualCache, PrefixCache
from dials_jax.config import (
    Data,
    EightBits,
    MeshConfig,
    Place,
    Seed,
    TaskData,
    Typed,
    Votes,
    WeightDtype,
    require_positive,
)
from dials_jax.errors import require
from dials_jax.sampling.ancestral import Ancestral
from dials_jax.sampling.autoregressive import Autoregressive
from dials_jax.sampling.block_diffusion import BlockDiffusion
from dials_jax.sampling.confidence import Confidence
from dials_jax.sampling.dream import Dream

SamplerConfig = Confidence | Dream | Ancestral | Autoregressive | BlockDiffusion
CacheConfig = PrefixCache | DualCache | EarlySkip

# Fields of a task that decide how sequences are padded: cost depends on them, scores do not.
PADDING_FIELDS = ("bucket", "max_programs")
# Fields of a task that only one kind of metric reads; setting them for another is refused.
_OF_CHOICES = ("choices", "choice_list", "label", "label_names")
_OF_CODE = ("program", "time_limit", "allow_code_execution")
_OF_GENERATION = ("compare", "match", "until", "sampler", "cache", *_OF_CODE)
_OF_LIKELIHOOD = ("cfg_scale",)
# Raise a metric's number when its scores change their meaning: stored ones are then not used.
METRIC_RULES = {"exact_match": 2, "code": 1, "choice": 1, "nelbo": 1}
# Fields that decide how outputs and log-likelihoods score. These are stored, so rules may change.
RULE_FIELDS = (
    "compare",
    "extract",
    "match",
    "until",
    "program",
    "time_limit",
    "normalise",
    "mean_over",
)


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
    metric: Literal["exact_match", "code", "choice", "nelbo"]
    data: Data
    # Multiple choice as in TaskData; where a task sets them, its data's do not count (choice).
    choices: tuple[str, ...] = ()
    choice_list: str = ""
    label: str = "label"
    label_names: str = ""
    # What the log-likelihood of a choice is divided by: its length, in the harness's acc_norm in
    # characters (choice)
    normalise: Literal["none", "tokens", "characters"] = "none"
    extract: str = ""  # regular expression that finds the answer in output and reference
    # How answers are compared: as text, or as mathematics in LaTeX (exact_match; needs math-verify)
    compare: Literal["text", "math"] = "text"
    match: Literal["first", "last"] | None = None  # None: the first; references have only one
    until: tuple[str, ...] = ()  # stop strings: an output is cut at the first (exact_match, code)
    # What is executed (code): a template, in which {output} is the generated text. It has to end
    # with tests that raise an error unless the output is right.
    program: str = ""
    time_limit: int = 3  # seconds of processor time for one program (code)
    allow_code_execution: bool = False  # required for code; docs/evaluation.md says what it means
    mean_over: str = ""  # a field ("subject"): results also have the mean of its groups' means
    limit: int | None = None  # first items only
    # How texts are generated (exact_match, code). None: Confidence, for data.answer_length tokens
    # in one block, one token per step.
    sampler: SamplerConfig | None = None
    cache: CacheConfig | None = None  # (exact_match, code)
    num_samples: int = 128  # Monte-Carlo masks per item (choice, nelbo)
    cfg_scale: float = 0.0  # guidance of likelihoods (choice, nelbo); samplers have their own
    bucket: int = 64  # lengths are padded to multiples of this
    max_programs: int = 4  # padded lengths that are compiled

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "num_samples", "bucket", "max_programs", "time_limit")
        require(bool(self.name.strip()), "a task has an empty name; give it one")
        require(
            self.cfg_scale >= 0,
            f"task {self.name!r}: cfg_scale={self.cfg_scale} must not be negative",
        )
        require(
            self.limit is None or self.limit > 0,
            f"task {self.name!r}: limit={self.limit} must be positive, or None",
        )
        require(
            all(self.until), f"task {self.name!r}: until={self.until} has an empty text; remove it"
        )
        self.question_data()
        if self.metric != "choice":
            self._require_unset(("normalise",), "is for metric 'choice'; leave it out")
        if self.metric == "code":
            self._require_unset(("compare", "extract", "match"), "is of exact_match; leave it out")
            require(
                "{output}" in self.program,
                f"task {self.name!r}: program={self.program!r} executes no output; put {{output}} "
                "where the generated text belongs, and tests behind it",
            )
        if self.metric == "exact_match":
            self._require_unset(_OF_CODE, "is for metric 'code'; leave it out")
        if self.generates:
            self._require_unset(
                _OF_LIKELIHOOD,
                "is of likelihoods; set it in the sampler, as Confidence(cfg_scale=)",
            )
        else:
            why = f"is for generation, but metric {self.metric!r} generates nothing; leave it out"
            self._require_unset(_OF_GENERATION, why)

    def question_data(self) -> Data:
        """The data, with the task's own fields of multiple choice in place of the data's."""
        default = {name: self.__dataclass_fields__[name].default for name in _OF_CHOICES}
        given = {n: getattr(self, n) for n in _OF_CHOICES if getattr(self, n) != default[n]}
        return replace(self.data, **given) if isinstance(self.data, TaskData) else self.data

    @property
    def generates(self) -> bool:
        """Whether outputs are generated, rather than likelihoods estimated."""
        return self.metric in ("exact_match", "code")

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

    model: Place
    routers: tuple[Place, ...] = ()  # workdirs of router training, one per lambda
    tasks: tuple[EvalTask, ...] = ()
    num_static: tuple[int, ...] = (1, 2, 3, 4)  # how many layers to skip; which: Goel, Algorithm 1
    # Whether neighbours may both be chosen (Goel, Tables 2 and 3); (False, True) is both kinds.
    allow_adjacent: tuple[bool, ...] = (False,)
    # Sets of layers to skip, counted from 0: ((4,), (4, 6)) are {5} and {5, 7} of DIALS.
    static_layers: tuple[tuple[int, ...], ...] = ()
    num_random: tuple[int, ...] = (1, 2, 3, 4)
    similarity_threshold: float | None = None  # tau of Goel, Algorithm 1 (0.95 there)
    num_calibration: int = 64  # prompts whose similarities choose the static layers
    # Where they come from. None: the task's training data if it names some, else its test prompts.
    calibration: Data | None = None
    # tau in place of the routers' own; of several, each is a policy of its own.
    skip_threshold: float | tuple[float, ...] | None = None
    # Routers also with thresholds that are fitted to these shares of layers.
    execution_ratios: tuple[float, ...] = ()
    votes: Votes | None = None  # in place of the routers' own; fitted thresholds have theirs
    batch_size: int = 32
    # Time every policy so many times in turns after scoring: results then have the median and the
    # spread. 0: times are those of scoring, measured once.
    timing_repeats: int = 0
    # Items of every task whose token-level KL to the full model is measured, for every policy. 0:
    # none. See evaluation/full_depth.py.
    kl_items: int = 0
    mesh: MeshConfig = MeshConfig()
    # Stacked layers compile much faster.
    layout: Literal["stacked", "unrolled", "fused", "auto"] = "stacked"
    dtype: WeightDtype | None = None
    weights: EightBits | None = None  # in 8 bits: layers and head; None: as stored
    batch_invariant: bool = False  # bitwise the same scores at any batch size: see `dials_jax.load`
    seed: Seed = 0

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "num_calibration", "batch_size")
        require(
            len(self.allow_adjacent) > 0,
            "allow_adjacent=() is neither kind of choice; give (False,), (True,) or (False, True)",
        )
        tau = self.similarity_threshold
        require(
            tau is None or -1 <= tau <= 1,
            f"similarity_threshold={tau} must be a cosine, in -1 to 1",
        )
        require(self.kl_items >= 0, f"kl_items={self.kl_items} must not be negative; 0 is none")
        taus = self.skip_threshold if isinstance(self.skip_threshold, tuple) else ()
        for tau in taus or (self.skip_threshold or 0.0,):
            require(0 <= tau < 1, f"skip_threshold={tau} must lie in [0, 1)")
        require(
            self.timing_repeats == 0 or self.timing_repeats > 1,
            f"timing_repeats={self.timing_repeats} shows no spread; give 2 or more, or 0",
        )
