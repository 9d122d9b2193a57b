"""AdamW with clipping and a linear warm-up, then half a cosine or a constant rate."""

from __future__ import annotations

from functools import lru_cache

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from dials_jax import trees
from dials_jax.config import OptimizerConfig
from dials_jax.errors import require


def num_steps(cfg: OptimizerConfig, steps_per_epoch: int) -> int:
    """Returns the steps of the whole training."""
    return _in_steps(cfg.num_steps, cfg.num_epochs, steps_per_epoch)


def warmup_steps(cfg: OptimizerConfig, steps_per_epoch: int) -> int:
    """Returns the steps of the warm-up."""
    return _in_steps(cfg.warmup_steps, cfg.warmup_epochs, steps_per_epoch)


def _in_steps(steps: int | None, epochs: float | None, steps_per_epoch: int) -> int:
    return steps if steps is not None else round(epochs * steps_per_epoch)


def make_lr_schedule(cfg: OptimizerConfig, steps_per_epoch: int) -> optax.Schedule:
    """Returns the learning rate by step: from 0 to its peak in the warm-up, then `cfg.lr_schedule`.

    Raises: InputError if the warm-up does not end before training does.
    """
    total, warmup = num_steps(cfg, steps_per_epoch), warmup_steps(cfg, steps_per_epoch)
    require(total > 0, "optimizer: training has no steps; raise num_steps or num_epochs")
    require(warmup >= 0, f"optimizer: a warm-up of {warmup} steps is negative; 0 is none")
    require(
        warmup < total,
        f"optimizer: a warm-up of {warmup} steps does not end within {total} steps; shorten it",
    )
    if cfg.lr_schedule == "constant":
        if not warmup:  # the schedule below would stay at its start, which is 0
            return optax.constant_schedule(cfg.learning_rate)
        return optax.warmup_constant_schedule(0.0, cfg.learning_rate, warmup)
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=cfg.learning_rate,
        warmup_steps=warmup,
        decay_steps=total,
        end_value=cfg.learning_rate * cfg.final_scale,
    )


@lru_cache(maxsize=16)  # as `make_train_step`
def make_optimizer(cfg: OptimizerConfig, steps_per_epoch: int) -> optax.GradientTransformation:
    """Returns AdamW after clipping the norm of the whole gradient."""
    return optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm),
        optax.adamw(
            make_lr_schedule(cfg, steps_per_epoch),
            b1=cfg.b1,
            b2=cfg.b2,
            eps=cfg.eps,
            weight_decay=cfg.weight_decay,
        ),
    )


def update_moving_average(
    average: trees.Params, params: trees.Params, num_updates: Int[Array, ""], decay: float
) -> trees.Params:
    """Returns the moving average after update n = `num_updates` of the parameters.

    The decay is min(decay, (1 + n) / (10 + n)), so that the random start is soon forgotten.

    Source: MDLM, `ema.py`.
    """
    rest = jnp.maximum(1 - decay, 9 / (10 + num_updates))
    return jax.tree.map(lambda a, p: a + rest * (p - a), average, params)
