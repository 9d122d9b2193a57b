"""One training run."""

from __future__ import annotations

from dataclasses import dataclass

from dials_jax.config.base import require, require_positive
from dials_jax.config.data import Data
from dials_jax.config.model import MeshConfig, ModelConfig, RouterConfig


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with linear warm-up, then half a cosine to `final_scale` (DIALS, appendix A.1)."""

    learning_rate: float = 5e-5
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.02
    clip_norm: float = 1.0
    final_scale: float = 0.0
    num_steps: int | None = None  # give steps or epochs, not both
    num_epochs: float | None = None
    warmup_steps: int | None = None
    warmup_epochs: float | None = None

    def __post_init__(self):
        for unit in ("num", "warmup"):
            given = [getattr(self, f"{unit}_{u}") is not None for u in ("steps", "epochs")]
            require(
                sum(given) == 1,
                f"optimizer: give exactly one of {unit}_steps and {unit}_epochs",
            )


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What a training step minimises."""

    min_ratio: float = 1e-3  # mask ratios are uniform between this and 1
    skip_weight: float = 1.0  # lambda (DIALS, equation 10); routers only
    target_skip_rate: float = 0.5  # alpha_target
    scale_skip_by_mask_ratio: bool = True  # False: the unscaled ablation of DIALS, figure 4

    def __post_init__(self):
        require(0 < self.min_ratio <= 1, f"min_ratio={self.min_ratio} must lie in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run: `backbone` empty trains a model, otherwise routers for that backbone."""

    backbone: str = ""  # a checkpoint or Hugging Face folder; it stays frozen
    model: ModelConfig | None = None  # the model to train from scratch
    router: RouterConfig = RouterConfig()
    data: Data
    optimizer: OptimizerConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    mesh: MeshConfig = MeshConfig()
    batch_size: int = 64  # rows a step over all devices and microbatches
    num_microbatches: int = 1
    remat: bool = False  # recompute blocks in the backward pass: less memory, a third more work
    seed: int = 0
    log_every: int = 10
    save_every: int = 1000
    keep_checkpoints: int = 2

    def __post_init__(self):
        require(
            bool(self.backbone) != (self.model is not None),
            "give either backbone= (train routers on it) or model= (train from scratch)",
        )
        require_positive(self, "batch_size", "num_microbatches", "log_every", "save_every")
        require_positive(self, "keep_checkpoints")
        require(
            self.batch_size % self.num_microbatches == 0,
            f"batch_size={self.batch_size} must be divisible by "
            f"num_microbatches={self.num_microbatches}",
        )
