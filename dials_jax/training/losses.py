"""The losses that training minimises: of a whole model, or of the routers of a frozen one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
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
from dials_jax.skipping.routed import StochasticRouted, gumbel_noise_scale


class Mean(NamedTuple):
    """A weighted mean, kept as a sum and its weight so that microbatches can be added."""

    total: Float[Array, ""]
    count: Float[Array, ""]

    @classmethod
    def of(cls, values: Array, weights: Array | float = 1.0) -> Mean:
        """Makes the mean of `values`; `weights` are broadcast to their shape."""
        weights = jnp.broadcast_to(weights, values.shape)
        return cls(jnp.sum(values * weights), jnp.sum(weights, dtype=jnp.float32))

    @property
    def value(self) -> Float[Array, ""]:
        return self.total / jnp.maximum(self.count, 1)


class Draws(NamedTuple):
    """Random keys and numbers per sequence, from the step and its index in the whole batch."""

    key: jax.Array
    stratum: Float[Array, "B"]  # in [0, 1), evenly spread over the whole batch
    step: Int[Array, ""] | int = 0  # of training, for what changes with it

    @classmethod
    def of(
        cls,
        step_key: jax.Array,
        sequence_index: Int[Array, "B"],
        num_sequences: Int[Array, ""] | int,
        step: Int[Array, ""] | int = 0,
    ) -> Draws:
        """Draws for the sequences of a microbatch, or of the whole batch.

        Args:
          sequence_index: in the whole batch.
          num_sequences: of the whole batch, without what only fills it.
        """
        keys = jax.vmap(jax.random.fold_in, (None, 0))(step_key, sequence_index)
        return cls(keys, stratified(step_key, sequence_index, num_sequences), step)


Metrics = dict[str, Mean]


def merge_metrics(parts: Sequence[Metrics]) -> dict[str, float]:
    """The means over several steps or batches, by their weights; none of what nothing counts in.

    Args:
      parts: on the host.
    """
    found = {}
    for name in parts[0]:
        total = np.sum([part[name].total for part in parts], dtype=float)
        count = np.sum([part[name].count for part in parts], dtype=float)
        if count:  # a cross-entropy of no token is not 0
            found[name] = float(total / count)
    return found


# loss(trainable, frozen, batch, draws) -> (sum over sequences, metrics)
LossFn = Callable[[trees.Params, trees.Params, Batch, Draws], tuple[Array, Metrics]]


@lru_cache(maxsize=16)  # as `make_train_step`
def model_loss(
    cfg: ModelConfig, objective: ObjectiveConfig, remat: bool, dropout: float = 0.0
) -> LossFn:
    """Returns the loss of all parameters of a model; its argument `frozen` is unused."""

    def loss(params, frozen, batch, draws):
        del frozen
        inputs = _draw_inputs(cfg, objective, batch, draws)
        drop = Dropout(inputs.layer_keys, dropout) if dropout else None
        out = _run_model(cfg, params, batch, inputs, remat, dropout=drop)
        total, nats = weighted_cross_entropy(
            *_predictions(cfg, params, out, batch, inputs),
            inputs.weights,
            # [MASK] is never predicted under SUBS.
            suppressed_id=cfg.mask_id if objective.kind == "mdlm" else None,
        )
        return total, _metrics(total, nats, batch, inputs)

    return loss


@lru_cache(maxsize=16)
def router_loss(
    cfg: ModelConfig, router: RouterConfig, objective: ObjectiveConfig, remat: bool
) -> LossFn:
    """Returns the loss of the routers, DIALS (10); `frozen` is the backbone."""

    def loss(routers, backbone, batch, draws):
        policy = StochasticRouted(
            routers,
            router.skip_threshold,
            router.temperature,
            gumbel_noise_scale(router, draws.step),
        )
        inputs = _draw_inputs(cfg, objective, batch, draws)
        out, cross_entropy, nats = _run_routed(
            cfg, objective, backbone, batch, inputs, policy, remat
        )
        num_masked, alpha = inputs.num_masked, skip_rate(out.gates)
        losses = dials_loss(
            cross_entropy,
            answer_length(batch.answer),
            num_masked,
            alpha,
            inputs.noise.ratio,
            objective,
        )
        total = jnp.sum(losses)
        rates = Mean.of(alpha, (num_masked > 0).astype(jnp.float32))
        return total, _metrics(total, nats, batch, inputs) | {"skip_rate": rates}

    return loss


def routed_metrics(cfg: ModelConfig, objective: ObjectiveConfig) -> Callable[..., Metrics]:
    """Returns `metrics(policy, backbone, batch, draws)`: what a policy runs, and its cross-entropy.

    `execution` is the share of layers run, over sequences with a masked token. Texts are masked as
    in training, so for one set of draws all policies see the same texts.
    """

    def metrics(policy, backbone, batch, draws):
        inputs = _draw_inputs(cfg, objective, batch, draws)
        out, _, nats = _run_routed(cfg, objective, backbone, batch, inputs, policy)
        voting = (inputs.num_masked > 0).astype(jnp.float32)
        return {
            "execution": Mean.of(jnp.mean(out.gates, axis=0), voting),
            "masked_ce": Mean(jnp.sum(nats), jnp.sum(inputs.num_masked, dtype=jnp.float32)),
        }

    return metrics


def run_masked(
    cfg: ModelConfig,
    objective: ObjectiveConfig,
    params: trees.Params,
    batch: Batch,
    draws: Draws,
    policy: Policy | None = None,
) -> tuple[StackOutput, Int[Array, "B"]]:
    """Runs the layers on texts masked as in training; also returns the masked tokens per text."""
    inputs = _draw_inputs(cfg, objective, batch, draws)
    return _run_model(cfg, params, batch, inputs, False, policy), inputs.num_masked


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
    if not causal:
        cfg.require_mask()
    require(not (causal and routers), "routers vote at [MASK]; give a masked diffusion backbone")


def count_rows(batch: Batch) -> Int[Array, ""]:
    """The rows that have an answer; what only fills a batch has none."""
    return jnp.sum(jnp.any(batch.answer, axis=1))


# ---------------------------------------------------------------------------------- inside


class _Inputs(NamedTuple):
    """The inputs and targets that an objective makes of a batch."""

    tokens: Int[Array, "B T"]  # the model's input
    targets: Int[Array, "B T"]  # the token that each position has to predict
    weights: Float[Array, "B T"]  # of each prediction in the sum over sequences; 0: no loss
    layer_keys: jax.Array  # per sequence, for what is drawn inside layers: gates or dropout
    noise: Noise | None = None  # None for a causal model

    @property
    def time(self) -> Float[Array, "B"] | None:
        return None if self.noise is None else self.noise.time

    @property
    def num_masked(self) -> Int[Array, "B"]:
        return jnp.sum(self.weights != 0, axis=1)


def _draw_inputs(
    cfg: ModelConfig, objective: ObjectiveConfig, batch: Batch, draws: Draws
) -> _Inputs:
    """Masks tokens at random; for a causal model, shifts the targets."""
    mask_keys, layer_keys = jax.vmap(jax.random.split)(draws.key).T
    if objective.kind == "causal":
        targets, counted = next_tokens(batch.tokens, batch.answer, batch.valid)
        return _Inputs(batch.tokens, targets, causal_weights(counted), layer_keys)
    ratio_keys, position_keys = jax.vmap(jax.random.split)(mask_keys).T
    if objective.kind == "mdlm":
        noise = stratified_noise(draws.stratum, objective.min_mask_ratio)
    else:
        noise = uniform_noise(ratio_keys, objective.min_mask_ratio)
    masked = corrupt(position_keys, batch.answer, noise.ratio)
    return _Inputs(
        tokens=jnp.where(masked, cfg.mask_id, batch.tokens),
        targets=batch.tokens,
        weights=diffusion_weights(masked, batch.answer, noise.weight),
        layer_keys=layer_keys,
        noise=noise,
    )


def _run_model(
    cfg: ModelConfig,
    params: trees.Params,
    batch: Batch,
    inputs: _Inputs,
    remat: bool,
    policy: Policy | None = None,
    dropout: Dropout | None = None,
) -> StackOutput:
    return transformer.run_layers(
        cfg,
        params,
        inputs.tokens,
        batch.valid,
        policy,
        time=inputs.time,
        sequence_keys=inputs.layer_keys,
        executor="select",
        remat=remat,
        dropout=dropout,
    )


def _run_routed(
    cfg: ModelConfig,
    objective: ObjectiveConfig,
    backbone: trees.Params,
    batch: Batch,
    inputs: _Inputs,
    policy: Policy,
    remat: bool = False,
) -> tuple[StackOutput, Float[Array, "B"], Float[Array, "B T"]]:
    """Runs a frozen model; also returns its cross-entropy per sequence, and per token."""
    out = _run_model(cfg, backbone, batch, inputs, remat, policy)
    cross_entropy, nats = sequence_cross_entropy(
        *_predictions(cfg, backbone, out, batch, inputs),
        # Ones, except with MDLM's noise, whose weight is not exactly 1 / p.
        (inputs.weights != 0) * (inputs.noise.weight * inputs.noise.ratio)[:, None],
        # A frozen model is scored by the predictions that it makes in generation.
        suppressed_id=cfg.mask_id if objective.kind == "mdlm" or cfg.subs else None,
    )
    return out, cross_entropy, nats


def _predictions(
    cfg: ModelConfig, params: trees.Params, out: StackOutput, batch: Batch, inputs: _Inputs
) -> tuple[Float[Array, "B T D"], HeadWeights, Int[Array, "B T"]]:
    """Returns the first arguments of a cross-entropy: hidden states, the head, and the targets."""
    h = transformer.shift_to_predicted(cfg, out.h, batch.valid)
    h = transformer.apply_final_norm(cfg, params, h, inputs.time)
    return h, HeadWeights(params["head"]["kernel"], params["head"].get("bias")), inputs.targets


def _metrics(total: Array, nats: Float[Array, "B T"], batch: Batch, inputs: _Inputs) -> Metrics:
    """Returns the loss, the cross-entropy in nats per predicted token, and the masked share."""
    count = jnp.sum(inputs.weights != 0, dtype=jnp.float32)
    loss = {"loss": Mean(total, count_rows(batch).astype(jnp.float32))}
    if inputs.noise is None:
        return loss | {"token_ce": Mean(jnp.sum(nats), count)}
    share = Mean(count, jnp.sum(batch.answer, dtype=jnp.float32))
    return loss | {"masked_ce": Mean(jnp.sum(nats), count), "masked_share": share}
