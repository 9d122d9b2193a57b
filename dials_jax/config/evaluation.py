"""Evaluation: tasks, and the policies that are compared on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dials_jax.config.data import Data
from dials_jax.config.model import MeshConfig, WeightDtype
from dials_jax.config.typed import Seed, Typed, require_positive
from dials_jax.errors import require

Algorithm = Literal["origin", "maskgit_plus", "topk_margin", "entropy"]  # of Dream's sampler

# Fields that only one kind of task reads. Elsewhere they would be settings without effect.
_OF_GENERATION = (
    "match", "until", "gen_length", "sampler", "temperature",
    "threshold", "factor", "delay_eos", "stop_at_eos", "cache",
)  # fmt: skip
_OF_DREAM = ("alg", "alg_temp", "top_p", "top_k")
_OF_LLADA = ("block_length", "cfg_scale", "threshold", "factor", "delay_eos", "stop_at_eos")


@dataclass(frozen=True, kw_only=True)
class EvalTask(Typed):
    """One evaluation task. `metric` decides how items are scored."""

    name: str
    metric: Literal["exact_match", "choice", "nelbo"]
    data: Data
    choices: tuple[str, ...] = ()  # templates, one a choice ("{sol1}", "{sol2}")
    choice_list: str = ""  # or one field that holds a list ("choices.text")
    label: str = "label"  # field with the index, or with the name, of the right choice
    label_names: str = ""  # field that lists the choices' names ("choices.label")
    extract: str = ""  # regular expression of what is compared, in answer and output alike
    match: Literal["first", "last"] | None = None  # None: the first; answers may hold one only
    until: tuple[str, ...] = ()  # stop strings: an output counts up to the first (exact_match)
    limit: int | None = None  # first items only
    num_samples: int = 128  # Monte-Carlo masks an item (choice, nelbo)
    gen_length: int | None = None  # tokens to generate (exact_match); default: data.answer_length
    steps: int | None = None  # denoising steps (exact_match); default: one a token
    sampler: Literal["confidence", "dream"] = "confidence"  # LLaDA's or Dream's (exact_match)
    temperature: float = 0.0  # of what is drawn; 0 takes the most probable (exact_match)
    alg: Algorithm | None = None  # Dream's order of revealing; default: entropy
    alg_temp: float | None = None  # Dream's, as are the next two: see sampling/dream.py
    top_p: float | None = None
    top_k: int | None = None
    block_length: int | None = None  # LLaDA's, as are the next six; default: one block
    cfg_scale: float = 0.0
    threshold: float | None = None  # reveal all tokens of this confidence (exact_match)
    factor: float | None = None  # or as many as are confident together (exact_match)
    delay_eos: bool = False  # no end of text after a masked token (exact_match)
    stop_at_eos: bool = False  # a row ends at its end of text (exact_match)
    cache: str = "none"  # or prefix, dual, es-PROMPT-BLOCK such as es-64-4 (exact_match)
    bucket: int = 64  # lengths are padded to multiples of this
    max_programs: int = 4  # lengths, or shapes of prompt and answer, that are compiled

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "num_samples", "bucket", "max_programs")
        require(
            self.limit is None or self.limit > 0,
            f"task {self.name!r}: limit={self.limit} must be positive, or None",
        )
        require(
            self.gen_length is None or self.gen_length > 0,
            f"task {self.name!r}: gen_length={self.gen_length} must be positive, or None",
        )
        require(
            all(self.until), f"task {self.name!r}: until={self.until} has an empty text; remove it"
        )
        require(
            len(self.choices) != 1 and len(set(self.choices)) == len(self.choices),
            f"task {self.name!r}: choices={self.choices} must be several, and all different",
        )
        if self.metric != "exact_match":
            why = f"is for generation, but metric {self.metric!r} generates nothing; leave it out"
            self._require_unset((*_OF_GENERATION, *_OF_DREAM), why)
        elif self.sampler == "dream":
            self._require_unset(_OF_LLADA, "is of LLaDA's sampler, not of Dream's; leave it out")
        else:
            self._require_unset(_OF_DREAM, "is of Dream's sampler; set sampler='dream'")

    def _require_unset(self, names: tuple[str, ...], why: str) -> None:
        for name in names:
            value, default = getattr(self, name), self.__dataclass_fields__[name].default
            require(value == default, f"task {self.name!r}: {name}={value!r} {why}")


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Typed):
    """A sweep of policies over tasks."""

    model: str
    routers: tuple[str, ...] = ()  # workdirs of router training, one a lambda
    tasks: tuple[EvalTask, ...] = ()
    static: tuple[int, ...] = (1, 2, 3, 4)  # numbers of layers to skip; layers by Goel, Algorithm 1
    random: tuple[int, ...] = (1, 2, 3, 4)
    similarity_threshold: float | None = None  # tau of Goel, Algorithm 1 (0.95 there)
    num_calibration: int = 64  # prompts whose similarities choose the static layers
    threshold: float | None = None  # overrides the routers' own
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
