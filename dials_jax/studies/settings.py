"""Settings of the study of representations, which hold a sampler, and all kinds of study.

`dials_jax.config` exports `RepresentationStudy`, too.
"""

from __future__ import annotations

from dataclasses import dataclass

from dials_jax.config import (
    Data,
    Layout,
    MeshConfig,
    ModelConfig,
    Place,
    Seed,
    StudyConfig,
    Typed,
    WeightDtype,
    require_positive,
)
from dials_jax.errors import nearest, require
from dials_jax.sampling.ancestral import Ancestral
from dials_jax.sampling.autoregressive import Autoregressive
from dials_jax.sampling.confidence import Confidence
from dials_jax.sampling.dream import Dream
from dials_jax.skipping.observing import Observer

CHANGE_LAYERS = 8  # at most, where the settings name none


@dataclass(frozen=True, kw_only=True)
class RepresentationStudy(Typed):
    """What hidden states look like, in diffusion and causal models (Goel, section 2).

    Every model continues the same questions, as its own tokenizer writes them. A causal model
    decodes its answers, and is then looked at in one forward pass over prompts and answers.
    """

    models: tuple[tuple[str, Place], ...]  # label and path of each
    adapted: tuple[str, ...] = ()  # labels of the diffusion models that continue a causal one
    data: Data
    num_prompts: int = 64  # the first ones
    # Tokens of a prompt that the models see: the last ones of a question, the first ones of a row
    # of text. None: all of a question, padded on the left, and `data.prompt_length` of a row.
    window: int | None = None
    gen_length: int = 256
    steps: int | None = None  # of diffusion models; None: one per token
    # Of diffusion models, with this gen_length and its own steps. None: each kind's own, greedy in
    # one block: Confidence (LLaDA), Dream, or Ancestral (MDLM).
    sampler: Confidence | Dream | Ancestral | None = None
    batch_size: int = 8
    # Layers after which the states of two steps are compared: the memory that the study takes.
    # None: 8 at most, as far apart as possible, the last one included.
    change_layers: tuple[int, ...] | None = None
    num_step_bins: int = 64  # groups of steps at most
    sink_factor: float = 5.0  # a sink's norm exceeds the median of its layer this many times
    num_decoded: int = 32  # tokens, where the page's figures show the middle of a trajectory
    dtype: WeightDtype | None = "bfloat16"
    layout: Layout = "auto"
    mesh: MeshConfig = MeshConfig()
    seed: Seed = 0

    def __post_init__(self):
        super().__post_init__()
        labels = [label for label, _ in self.models]
        require(bool(labels), "models is empty; give labels and paths, such as LLaDA LLaDA-8B-Base")
        require(all(labels), "models: a label is empty; name the model")
        require(
            len(set(labels)) == len(labels),
            f"models: labels {', '.join(labels)} name one twice; give each model its own",
        )
        for label in self.adapted:
            known = f"no model is called {label!r}{nearest(label, labels)}"
            require(label in labels, f"adapted: {known}")
        require_positive(self, "batch_size", "num_decoded")
        require(self.num_prompts > 1, f"num_prompts={self.num_prompts}: an interval needs two")
        require(self.gen_length > 1, f"gen_length={self.gen_length}: neighbours are two tokens")
        for name in ("window", "steps"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name}={value} must be positive, or None")
        self._check_sampler()
        Observer(self.num_step_bins, self.change_layers or (), self.sink_factor)

    def _check_sampler(self) -> None:
        if self.sampler is None:
            return
        length = self.sampler.gen_length
        require(
            length == self.gen_length,
            f"gen_length={self.gen_length}, but the sampler generates {length} tokens; make them "
            "equal",
        )
        require(self.steps is None, "steps: the sampler has its own; leave out one of them")
        require(
            self.sampler.cfg_scale == 0,
            "guidance shows a model every canvas twice, and the study looks at it once; set "
            "cfg_scale=0",
        )

    def sampler_of(self, model: ModelConfig) -> Confidence | Dream | Ancestral | Autoregressive:
        """What fills a model's canvases."""
        if model.causal:
            return Autoregressive(self.gen_length)
        if self.sampler is not None:
            return self.sampler
        steps = self.steps or self.gen_length
        if model.model_type == "mdlm":
            return Ancestral(self.gen_length, steps)
        if model.model_type == "dream":
            return Dream(self.gen_length, steps)
        return Confidence(self.gen_length, steps=steps)

    def observer_of(self, model: ModelConfig) -> Observer:
        """What is measured of a model."""
        layers = self.change_layers
        if model.causal:
            layers = ()
        elif layers is None:
            layers = spread(model.num_layers, CHANGE_LAYERS)
        return Observer(self.num_step_bins, layers, self.sink_factor)


def spread(num_layers: int, count: int) -> tuple[int, ...]:
    """At most `count` layers at equal distances, the last one included."""
    count = min(count, num_layers)
    return tuple((i + 1) * num_layers // count - 1 for i in range(count))


AnyStudy = StudyConfig | RepresentationStudy
