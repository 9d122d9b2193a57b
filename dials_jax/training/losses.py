"""What a training step minimises: a whole model, or the routers of a frozen one."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dials_jax import trees
from dials_jax.config import ModelConfig, ObjectiveConfig, RouterConfig
from dials_jax.data.batches import Batch
from dials_jax.diffusion.cross_entropy import HeadWeights, weighted_cross_entropy
from dials_jax.diffusion.noise import corrupt, stratified, stratified_noise, uniform_noise
from dials_jax.diffusion.objectives import (
    causal_weights,
    diffusion_weights,
    next_tokens,
    skip_loss,
)
from dials_jax.errors import require
from dials_jax.models import transformer
from dials_jax.nn.dropout import Dropout
from dials_jax.nn.policy import Policy
from dials_jax.nn.stack import StackOutput
from dials_jax.skipping.routed import StochasticRouted


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


class Draws(NamedTuple):
    """The randomness of each row, from the step and the row's number in the whole batch."""

    key: jax.Array
    place: Float[Array, "B"]  # in [0, 1), spread evenly over the whole batch

    @classmethod
    def of(cls, step_key: jax.Array, row: Int[Array, "B"], num_rows: int) -> Draws:
        """
        Args:
          row: of a microbatch or of all.
          num_rows: of the whole batch.
        """
        keys = jax.vmap(jax.random.fold_in, (None, 0))(step_key, row)
        return cls(keys, stratified(step_key, row, num_rows))


Metrics = dict[str, Mean]
# loss(trainable, frozen, batch, draws) -> (sum over rows, metrics)
LossFn = Callable[[trees.Params, trees.Params, Batch, Draws], tuple[Array, Metrics]]


def model_loss(
    cfg: ModelConfig, objective: ObjectiveConfig, remat: bool, dropout: float = 0.0
) -> LossFn:
    """The loss of all parameters; `frozen` is unused."""

    def loss(params, frozen, batch, draws):
        del frozen
        view = _view(cfg, objective, batch, draws)
        drop = Dropout(view.layer_keys, dropout) if dropout else None
        out = _run(cfg, params, batch, view, remat, dropout=drop)
        total, metrics = _cross_entropy(cfg, objective, params, out, batch, view, True)
        return total, {"loss": Mean(total, _num_rows(batch)), **metrics}

    return loss


def router_loss(
    cfg: ModelConfig, router: RouterConfig, objective: ObjectiveConfig, remat: bool
) -> LossFn:
    """The DIALS loss of the routers; `frozen` holds the backbone, which gets no gradient."""

    def loss(routers, backbone, batch, draws):
        view = _view(cfg, objective, batch, draws)
        policy = StochasticRouted(routers, router.threshold, router.temperature)
        out = _run(cfg, backbone, batch, view, remat, policy)
        total, metrics = _cross_entropy(cfg, objective, backbone, out, batch, view, False)
        skip_rate = 1.0 - jnp.mean(out.gates, axis=0)
        num_masked = jnp.sum(view.weights != 0, axis=1)
        total += jnp.sum(skip_loss(num_masked, view.ratio, skip_rate, objective))
        seen = (num_masked > 0).astype(jnp.float32)
        metrics |= {"loss": Mean(total, _num_rows(batch)), "skip_rate": Mean.of(skip_rate, seen)}
        return total, metrics

    return loss


def check_objective(cfg: ModelConfig, objective: ObjectiveConfig, routers: bool = False) -> None:
    """Raises: InputError for an objective that the model cannot be trained with."""
    causal = objective.kind == "causal"
    require(
        causal == cfg.causal,
        f"objective.kind={objective.kind!r} does not fit a model with causal={cfg.causal}; "
        "'causal' is for causal models, 'llada' and 'mdlm' are for the others",
    )
    require(
        objective.kind != "mdlm" or objective.min_ratio < 1,
        "objective.min_ratio=1 leaves nothing to mask under kind='mdlm'; give a small one",
    )
    require(not (causal and routers), "routers vote at [MASK]; give a masked diffusion backbone")


# ---------------------------------------------------------------------------------- inside


class _View(NamedTuple):
    """A batch as an objective sees it."""

    tokens: Int[Array, "B T"]  # what the model reads
    targets: Int[Array, "B T"]  # what each place is to predict
    weights: Float[Array, "B T"]  # of each prediction in the sum over rows; 0: it has no loss
    layer_keys: jax.Array  # of what is drawn inside the layers: gates, or dropout
    time: Float[Array, "B"] | None = None
    ratio: Float[Array, "B"] | None = None


def _view(cfg: ModelConfig, objective: ObjectiveConfig, batch: Batch, draws: Draws) -> _View:
    mask_keys, layer_keys = jax.vmap(jax.random.split)(draws.key).T
    if objective.kind == "causal":
        targets, counted = next_tokens(batch.tokens, batch.answer, batch.valid)
        return _View(batch.tokens, targets, causal_weights(counted), layer_keys)
    ratio_keys, position_keys = jax.vmap(jax.random.split)(mask_keys).T
    if objective.kind == "mdlm":
        noise = stratified_noise(draws.place, objective.min_ratio)
    else:
        noise = uniform_noise(ratio_keys, objective.min_ratio)
    masked = corrupt(position_keys, batch.answer, noise.ratio)
    return _View(
        tokens=jnp.where(masked, cfg.mask_id, batch.tokens),
        targets=batch.tokens,
        weights=diffusion_weights(masked, batch.answer, noise.weight),
        layer_keys=layer_keys,
        time=noise.time,
        ratio=noise.ratio,
    )


def _run(
    cfg: ModelConfig,
    params: trees.Params,
    batch: Batch,
    view: _View,
    remat: bool,
    policy: Policy | None = None,
    dropout: Dropout | None = None,
) -> StackOutput:
    return transformer.run_layers(
        cfg,
        params,
        view.tokens,
        batch.valid,
        policy,
        time=view.time,
        sequence_keys=view.layer_keys,
        executor="select",
        remat=remat,
        dropout=dropout,
    )


def _cross_entropy(
    cfg: ModelConfig,
    objective: ObjectiveConfig,
    params: trees.Params,
    out: StackOutput,
    batch: Batch,
    view: _View,
    train_head: bool,
) -> tuple[Array, Metrics]:
    """Its weighted sum, and in nats a predicted token; the share of the answers that was masked."""
    h = transformer.shift_to_predicted(cfg, out.h, batch.valid)
    # A frozen model is scored as it predicts, one in training as its objective says.
    never_masks = objective.kind == "mdlm" or (cfg.subs and not train_head)
    total, nats = weighted_cross_entropy(
        transformer.apply_final_norm(cfg, params, h, view.time),
        HeadWeights(params["head"]["kernel"], params["head"].get("bias")),
        view.targets,
        view.weights,
        never=cfg.mask_id if never_masks else None,
        train_head=train_head,
    )
    count = jnp.sum(view.weights != 0, dtype=jnp.float32)
    nats = Mean(jnp.sum(nats), count)
    if objective.kind == "causal":
        return total, {"token_ce": nats}
    share = Mean(count, jnp.sum(batch.answer, dtype=jnp.float32))
    return total, {"masked_ce": nats, "masked_share": share}


def _num_rows(batch: Batch) -> Float[Array, ""]:
    return jnp.float32(batch.row.shape[0])
