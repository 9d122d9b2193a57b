"""The settings of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from dials_jax.config.data import Data
from dials_jax.config.model import MeshConfig, ModelConfig, RouterConfig
from dials_jax.config.typed import Place, Seed, Typed, require_positive
from dials_jax.errors import require

RateSchedule = Literal["cosine", "constant"]
Objective = Literal["llada", "mdlm", "causal"]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Typed):
    """AdamW with clipping and a linear warm-up of the learning rate.

    After the warm-up the rate falls by half a cosine to `final_scale` times its peak (DIALS,
    appendix A.1), or it stays constant (MDLM).
    """

    RENAMED: ClassVar[dict[str, str]] = {"schedule": "lr_schedule"}

    learning_rate: float = 5e-5  # at the end of the warm-up
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.02
    clip_norm: float = 1.0  # the largest norm of the whole gradient
    lr_schedule: RateSchedule = "cosine"
    final_scale: float = 0.0  # cosine only: last rate / learning_rate
    ema: float | None = None  # decay of a moving average, which is then the exported model
    num_steps: int | None = None  # give steps or epochs, not both
    num_epochs: float | None = None
    warmup_steps: int | None = None
    warmup_epochs: float | None = None

    def __post_init__(self):
        super().__post_init__()
        for unit in ("num", "warmup"):
            given = [getattr(self, f"{unit}_{u}") is not None for u in ("steps", "epochs")]
            require(
                sum(given) == 1,
                f"optimizer: give exactly one of {unit}_steps and {unit}_epochs",
            )
        for name in ("learning_rate", "clip_norm"):  # clipped at 0, no gradient is left
            value = getattr(self, name)
            require(0 < value < math.inf, f"optimizer: {name}={value} must be positive and finite")
        for name in ("b1", "b2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optimizer: {name}={value} must lie in [0, 1)")
        for name in ("eps", "weight_decay", "final_scale"):
            value = getattr(self, name)
            require(value >= 0, f"optimizer: {name}={value} must not be negative")
        require(
            self.ema is None or 0 < self.ema < 1,
            f"optimizer: ema={self.ema} must lie between 0 and 1, or be None",
        )


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(Typed):
    """The loss that training minimises.

    - llada: a mask ratio per sequence, drawn alone; cross-entropy / ratio / answer length.
    - mdlm: as llada, with ratios spread evenly over the batch and [MASK] never predicted (SUBS).
    - causal: the cross-entropy of the next token, for causal models.
    """

    RENAMED: ClassVar[dict[str, str]] = {"min_ratio": "min_mask_ratio"}

    kind: Objective = "llada"
    min_mask_ratio: float = 1e-3  # mask ratios are uniform between this and 1
    skip_weight: float = 1.0  # lambda of DIALS (10); routers only
    target_skip_rate: float = 0.5  # alpha_target of DIALS (8)
    scale_skip_by_mask_ratio: bool = True  # False: the unscaled ablation of DIALS, Figure 4

    def __post_init__(self):
        super().__post_init__()
        require(
            0 < self.min_mask_ratio <= 1,
            f"min_mask_ratio={self.min_mask_ratio} must lie in (0, 1]",
        )
        require(
            0 <= self.target_skip_rate <= 1,
            f"target_skip_rate={self.target_skip_rate} must lie in [0, 1]",
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Typed):
    """One training run, of routers for the model `backbone`, or of a model.

    The exported weights are the moving average if `optimizer.ema` asks for one.
    """

    RENAMED: ClassVar[dict[str, str]] = {"unrolled": "layout"}

    backbone: Place = (
        ""  # a model folder or Hugging Face folder, stays frozen; empty: train a model
    )
    model: ModelConfig | None = None  # the model to train, without a backbone
    init_from: Place = (
        ""  # the folder of a model whose weights it starts from; empty: random weights
    )
    router: RouterConfig = RouterConfig()
    data: Data
    optimizer: OptimizerConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    mesh: MeshConfig = MeshConfig()
    batch_size: int = 64  # sequences per step over all devices and microbatches
    num_microbatches: int = 1
    dropout: float = 0.0  # rate, on what attention and MLPs add to the residual stream; model only
    remat: bool = False  # recompute blocks in the backward pass: less memory, a third more work
    # Of the model, or of the frozen backbone of routers. Unrolled: faster steps, slower to compile;
    # for routers of LLaDA-8B 1.4 times as fast on an H200 (docs/results/router_training.md).
    layout: Literal["stacked", "unrolled"] = "stacked"
    seed: Seed = 0
    # Held-out data, scored every so many steps and after the last one: see docs/skipping.md.
    validation: Data | None = None
    validate_every: int = 100
    validation_batches: int = 8  # of batch_size sequences, at most; the same ones every time
    validation_thresholds: tuple[float, ...] = ()  # more values of tau that routers are scored at
    fit_execution: tuple[float, ...] = ()  # shares of layers to which thresholds are fitted last
    log_every: int = 10
    save_every: int = 1000
    keep_checkpoints: int = 2
    # Models after these steps are exported as well, to steps/00000100/ and so on; 0: the first one.
    keep_models_at: tuple[int, ...] = ()
    max_minutes: float | None = None  # save and stop this long after the first step is compiled

    def __post_init__(self):
        super().__post_init__()
        require(
            bool(self.backbone) != (self.model is not None),
            "give either backbone= (train routers on it) or model= (train from scratch)",
        )
        require(
            not (self.backbone and self.init_from),
            "init_from= is for training a model; routers start from scratch on their backbone",
        )
        require(
            0 <= self.dropout < 1 and not (self.backbone and self.dropout),
            f"dropout={self.dropout} must lie in [0, 1), and be 0 for routers",
        )
        require(
            self.max_minutes is None or self.max_minutes > 0,
            f"max_minutes={self.max_minutes} must be positive, or None",
        )
        self._check_validation()
        require(
            not (self.backbone and self.keep_models_at),
            f"keep_models_at={self.keep_models_at} is for training a model; leave it out for "
            "routers",
        )
        require(
            all(step >= 0 for step in self.keep_models_at),
            f"keep_models_at={self.keep_models_at} has a negative step; steps count from 0",
        )
        require_positive(self, "batch_size", "num_microbatches", "log_every", "save_every")
        require_positive(self, "keep_checkpoints")
        require(
            self.batch_size % self.num_microbatches == 0,
            f"batch_size={self.batch_size} must be divisible by "
            f"num_microbatches={self.num_microbatches}",
        )

    def _check_validation(self) -> None:
        require_positive(self, "validate_every", "validation_batches")
        for name in ("validation_thresholds", "fit_execution"):
            values = getattr(self, name)
            require(
                not values or bool(self.backbone and self.validation),
                f"{name}={values} is for routers with validation=; set it, or leave {name} out",
            )
            require(
                all(0 <= value < 1 for value in values) and len(set(values)) == len(values),
                f"{name}={values} must be different numbers in [0, 1)",
            )
        require(
            0 not in self.fit_execution,
            f"fit_execution={self.fit_execution}: a share of 0 runs no layer; give shares above 0",
        )

    @classmethod
    def upgraded(cls, values: dict[str, Any]) -> dict[str, Any]:
        values = super().upgraded(values)
        if isinstance(values.get("layout"), bool):  # `unrolled`, in earlier versions
            values["layout"] = "unrolled" if values["layout"] else "stacked"
        return values
