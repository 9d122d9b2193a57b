"""AdamW with clipping, linear warm-up and half a cosine (DIALS, appendix A.1)."""

from __future__ import annotations

import optax

from dials_jax.config import OptimizerConfig, require


def num_steps(cfg: OptimizerConfig, steps_per_epoch: int) -> int:
    return _in_steps(cfg.num_steps, cfg.num_epochs, steps_per_epoch)


def warmup_steps(cfg: OptimizerConfig, steps_per_epoch: int) -> int:
    return _in_steps(cfg.warmup_steps, cfg.warmup_epochs, steps_per_epoch)


def _in_steps(steps: int | None, epochs: float | None, steps_per_epoch: int) -> int:
    return steps if steps is not None else round(epochs * steps_per_epoch)


def make_schedule(cfg: OptimizerConfig, steps_per_epoch: int) -> optax.Schedule:
    """Learning rate by step: 0 to the peak over the warm-up, then half a cosine to the end.

    Raises: InputError if the warm-up does not end before training does.
    """
    total, warmup = num_steps(cfg, steps_per_epoch), warmup_steps(cfg, steps_per_epoch)
    require(total > 0, "optimizer: training has no steps; raise num_steps or num_epochs")
    require(
        warmup < total,
        f"optimizer: a warm-up of {warmup} steps does not end within {total} steps; shorten it",
    )
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=cfg.learning_rate,
        warmup_steps=warmup,
        decay_steps=total,
        end_value=cfg.learning_rate * cfg.final_scale,
    )


def make_optimizer(cfg: OptimizerConfig, steps_per_epoch: int) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm),
        optax.adamw(
            make_schedule(cfg, steps_per_epoch),
            b1=cfg.b1,
            b2=cfg.b2,
            eps=cfg.eps,
            weight_decay=cfg.weight_decay,
        ),
    )
