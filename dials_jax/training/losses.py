"""What a training step minimises: a whole model, or the routers of a frozen one."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dials_jax import trees
from dials_jax.config import ModelConfig, ObjectiveConfig, RouterConfig
from dials_jax.data.batches import Batch
from dials_jax.diffusion.corruption import corrupt
from dials_jax.diffusion.objectives import dials_loss, diffusion_loss, masked_log_probs
from dials_jax.models import transformer
from dials_jax.nn.stack import StackOutput
from dials_jax.skipping.policies import StochasticRouted


class Mean(NamedTuple):
    """A mean that can be summed over microbatches before it is divided."""

    total: Float[Array, ""]
    count: Float[Array, ""]

    @classmethod
    def of(cls, values: Array, weights: Array | float = 1.0) -> Mean:
        weights = jnp.broadcast_to(weights, values.shape)
        return cls(jnp.sum(values * weights), jnp.sum(weights, dtype=jnp.float32))

    @property
    def value(self) -> Float[Array, ""]:
        return self.total / jnp.maximum(self.count, 1)


Metrics = dict[str, Mean]
# loss(trainable, frozen, batch, row_keys) -> (sum over rows, metrics)
LossFn = Callable[[trees.Params, trees.Params, Batch, jax.Array], tuple[Array, Metrics]]


class _Masked(NamedTuple):
    """Sums over the masked tokens of each row."""

    cross_entropy: Float[Array, "B"]
    count: Array
    answer_length: Array
    ratio: Array


def model_loss(cfg: ModelConfig, objective: ObjectiveConfig, remat: bool) -> LossFn:
    """The diffusion loss of all parameters; `frozen` is unused."""

    def loss(params, frozen, batch, row_keys):
        del frozen
        sums, _ = _forward(cfg, params, batch, row_keys, objective, None, remat)
        rows = diffusion_loss(sums.cross_entropy, sums.answer_length, sums.ratio)
        return jnp.sum(rows), {"loss": Mean.of(rows), **_metrics(sums)}

    return loss


def router_loss(
    cfg: ModelConfig, router: RouterConfig, objective: ObjectiveConfig, remat: bool
) -> LossFn:
    """The DIALS loss of the routers; `frozen` holds the backbone, which gets no gradient."""

    def loss(routers, backbone, batch, row_keys):
        policy = StochasticRouted(routers, router.threshold, router.temperature)
        sums, out = _forward(cfg, backbone, batch, row_keys, objective, policy, remat)
        skip_rate = 1.0 - jnp.mean(out.gates, axis=0)
        rows = dials_loss(
            sums.cross_entropy, sums.answer_length, sums.count, sums.ratio, skip_rate, objective
        )
        seen = (sums.count > 0).astype(jnp.float32)
        metrics = {"skip_rate": Mean.of(skip_rate, seen), **_metrics(sums)}
        return jnp.sum(rows), {"loss": Mean.of(rows), **metrics}

    return loss


def _forward(
    cfg: ModelConfig, params, batch: Batch, row_keys, objective, policy, remat: bool
) -> tuple[_Masked, StackOutput]:
    """One pass over corrupted rows."""
    mask_keys, gate_keys = jax.vmap(jax.random.split)(row_keys).T
    masked, ratio = corrupt(mask_keys, batch.answer, objective.min_ratio)
    noisy = jnp.where(masked, cfg.mask_id, batch.tokens)
    out = transformer.run_layers(
        cfg,
        params,
        noisy,
        batch.valid,
        policy,
        row_keys=gate_keys,
        executor="select",
        remat=remat,
    )
    logits = transformer.predictions(cfg, params, out.h, batch.valid)
    log_probs = masked_log_probs(logits, batch.tokens, masked)
    sums = _Masked(
        cross_entropy=-jnp.sum(log_probs, axis=1),
        count=jnp.sum(masked, axis=1),
        answer_length=jnp.sum(batch.answer, axis=1),
        ratio=ratio,
    )
    return sums, out


def _metrics(sums: _Masked) -> Metrics:
    """Cross-entropy in nats a masked token, and the share of the answers that was masked."""
    count = jnp.sum(sums.count).astype(jnp.float32)
    return {
        "masked_ce": Mean(jnp.sum(sums.cross_entropy), count),
        "masked_share": Mean(count, jnp.sum(sums.answer_length).astype(jnp.float32)),
    }
