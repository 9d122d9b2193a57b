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
from dials_jax.diffusion.cross_entropy import (
    HeadWeights,
    sequence_cross_entropy,
    weighted_cross_entropy,
)
from dials_jax.diffusion.noise import (
    Noise,
    corrupt,
    stratified,
    stratified_noise,
    uniform_noise,
)
from dials_jax.diffusion.objectives import (
    answer_length,
    causal_weights,
    dials_loss,
    diffusion_weights,
    next_tokens,
    skip_rate,
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
    """The randomness of each sequence, from the step and its number in the whole batch."""

    key: jax.Array
    stratum: Float[Array, "B"]  # in [0, 1), spread evenly over the whole batch

    @classmethod
    def of(cls, step_key: jax.Array, sequence: Int[Array, "B"], num_sequences: int) -> Draws:
        """
        Args:
          sequence: numbers in the whole batch, of a microbatch or of all.
          num_sequences: of the whole batch.
        """
        keys = jax.vmap(jax.random.fold_in, (None, 0))(step_key, sequence)
        return cls(keys, stratified(step_key, sequence, num_sequences))


Metrics = dict[str, Mean]
# loss(trainable, frozen, batch, draws) -> (sum over sequences, metrics)
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
        total, nats = weighted_cross_entropy(
            *_predictions(cfg, params, out, batch, view),
            view.weights,
            # [MASK] is never predicted under SUBS.
            suppressed_id=cfg.mask_id if objective.kind == "mdlm" else None,
        )
        return total, _metrics(total, nats, batch, view)

    return loss


def router_loss(
    cfg: ModelConfig, router: RouterConfig, objective: ObjectiveConfig, remat: bool
) -> LossFn:
    """The loss of the routers, DIALS (10); `frozen` holds the backbone, which gets no gradient."""

    def loss(routers, backbone, batch, draws):
        view = _view(cfg, objective, batch, draws)
        policy = StochasticRouted(routers, router.skip_threshold, router.temperature)
        out = _run(cfg, backbone, batch, view, remat, policy)
        masked, p_mask = view.weights != 0, view.noise.ratio
        cross_entropy, nats = sequence_cross_entropy(
            *_predictions(cfg, backbone, out, batch, view),
            # 1, but for MDLM's noise, whose weight is not quite 1 / p.
            masked * (view.noise.weight * p_mask)[:, None],
            # A frozen model is scored with the predictions that it makes.
            suppressed_id=cfg.mask_id if objective.kind == "mdlm" or cfg.subs else None,
        )
        num_masked, alpha = jnp.sum(masked, axis=1), skip_rate(out.gates)
        num_answer = answer_length(batch.answer)
        losses = dials_loss(cross_entropy, num_answer, num_masked, alpha, p_mask, objective)
        total = jnp.sum(losses)
        rates = Mean.of(alpha, (num_masked > 0).astype(jnp.float32))
        return total, _metrics(total, nats, batch, view) | {"skip_rate": rates}

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
        objective.kind != "mdlm" or objective.min_mask_ratio < 1,
        "objective.min_mask_ratio=1 leaves nothing to mask under kind='mdlm'; give a small one",
    )
    require(not (causal and routers), "routers vote at [MASK]; give a masked diffusion backbone")


# ---------------------------------------------------------------------------------- inside


class _View(NamedTuple):
    """A batch as an objective sees it."""

    tokens: Int[Array, "B T"]  # what the model reads
    targets: Int[Array, "B T"]  # what each position is to predict
    weights: Float[Array, "B T"]  # of each prediction in the sum over sequences; 0: it has no loss
    layer_keys: jax.Array  # of what is drawn inside the layers: gates, or dropout
    noise: Noise | None = None  # None: a causal model's

    @property
    def time(self) -> Float[Array, "B"] | None:
        return None if self.noise is None else self.noise.time


def _view(cfg: ModelConfig, objective: ObjectiveConfig, batch: Batch, draws: Draws) -> _View:
    mask_keys, layer_keys = jax.vmap(jax.random.split)(draws.key).T
    if objective.kind == "causal":
        targets, counted = next_tokens(batch.tokens, batch.answer, batch.valid)
        return _View(batch.tokens, targets, causal_weights(counted), layer_keys)
    ratio_keys, position_keys = jax.vmap(jax.random.split)(mask_keys).T
    if objective.kind == "mdlm":
        noise = stratified_noise(draws.stratum, objective.min_mask_ratio)
    else:
        noise = uniform_noise(ratio_keys, objective.min_mask_ratio)
    masked = corrupt(position_keys, batch.answer, noise.ratio)
    return _View(
        tokens=jnp.where(masked, cfg.mask_id, batch.tokens),
        targets=batch.tokens,
        weights=diffusion_weights(masked, batch.answer, noise.weight),
        layer_keys=layer_keys,
        noise=noise,
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


def _predictions(
    cfg: ModelConfig, params: trees.Params, out: StackOutput, batch: Batch, view: _View
) -> tuple[Float[Array, "B T D"], HeadWeights, Int[Array, "B T"]]:
    """What a cross-entropy compares: the states that predict, the head, and the targets."""
    h = transformer.shift_to_predicted(cfg, out.h, batch.valid)
    h = transformer.apply_final_norm(cfg, params, h, view.time)
    return h, HeadWeights(params["head"]["kernel"], params["head"].get("bias")), view.targets


def _metrics(total: Array, nats: Float[Array, "B T"], batch: Batch, view: _View) -> Metrics:
    """The loss, the cross-entropy per predicted token in nats, and the masked share of answers."""
    count = jnp.sum(view.weights != 0, dtype=jnp.float32)
    loss = {"loss": Mean(total, jnp.float32(batch.sequence_index.shape[0]))}
    if view.noise is None:
        return loss | {"token_ce": Mean(jnp.sum(nats), count)}
    share = Mean(count, jnp.sum(batch.answer, dtype=jnp.float32))
    return loss | {"masked_ce": Mean(jnp.sum(nats), count), "masked_share": share}
