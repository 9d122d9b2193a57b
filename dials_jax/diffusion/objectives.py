"""Losses of masked diffusion, one number a row."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dials_jax.config import ObjectiveConfig


def masked_log_probs(
    logits: Float[Array, "B T V"], tokens: Int[Array, "B T"], masked: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
    """log p of the tokens where masked, 0 elsewhere; nats."""
    # A comparison fuses with its neighbours; the gradient of a gather is a scatter over all logits.
    is_token = jnp.arange(logits.shape[-1]) == tokens[..., None]
    chosen = jnp.sum(jnp.where(is_token, logits, 0.0), axis=-1)
    return jnp.where(masked, chosen - jax.nn.logsumexp(logits, axis=-1), 0.0)


def diffusion_weights(
    masked: Bool[Array, "B T"], answer: Bool[Array, "B T"], weight: Float[Array, "B"]
) -> Float[Array, "B T"]:
    """What a token's cross-entropy counts in its row's loss: weight / answer length where masked.

    The loss bounds the negative log-likelihood a token, in nats. With the whole row as the answer
    it is that of pre-training, otherwise that of fine-tuning (LLaDA, equations 3 and 5; MDLM,
    equation 10, whose mean over a batch of whole rows is the mean over its tokens).

    Args:
      weight: of the row, from its noise level.
    """
    return masked * (weight / answer_length(answer))[:, None]


def causal_weights(counted: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    """A row's loss is the mean over its tokens that count."""
    return counted / answer_length(counted)[:, None]


def answer_length(answer: Bool[Array, "B T"]) -> Int[Array, "B"]:
    """At least 1: a row without an answer has no loss to divide."""
    return jnp.maximum(jnp.sum(answer, axis=1), 1)


def next_tokens(
    tokens: Int[Array, "B T"], answer: Bool[Array, "B T"], valid: Bool[Array, "B T"] | None
) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
    """What a causal model predicts at each place, and where it is an answer token with a left.

    Nothing predicts the first token of a row.
    """
    counted = answer[:, 1:] if valid is None else answer[:, 1:] & valid[:, :-1]
    return jnp.roll(tokens, -1, axis=1), jnp.pad(counted, ((0, 0), (0, 1)))


def skip_loss(
    num_masked: Int[Array, "B"],
    ratio: Float[Array, "B"],
    skip_rate: Float[Array, "B"],
    cfg: ObjectiveConfig,
) -> Float[Array, "B"]:
    """lambda |alpha - alpha_target| / p, what DIALS adds to a row's loss (equations 8 to 10).

    A row without a masked token contributes nothing: its skip loss would be weighed by up to
    1 / min_ratio although its routers saw nothing.

    Args:
      ratio: the probability p with which tokens were masked.
      skip_rate: alpha, the mean over layers of the binary skip gate.
    """
    loss = cfg.skip_weight * jnp.abs(skip_rate - cfg.target_skip_rate)
    if cfg.scale_skip_by_mask_ratio:
        loss = loss / ratio
    return jnp.where(num_masked > 0, loss, 0.0)
