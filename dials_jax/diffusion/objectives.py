"""Losses of masked diffusion per sequence, and that of the routers: DIALS (8), (9) and (10)."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dials_jax.config import ObjectiveConfig
from dials_jax.nn.kernels.row_sums import logsumexp, row_sum


def masked_log_probs(
    logits: Float[Array, "B T V"], tokens: Int[Array, "B T"], masked: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
    """log p of the tokens where masked, 0 elsewhere; nats."""
    # A comparison fuses with its neighbours; the gradient of a gather is a scatter over all logits.
    is_token = jnp.arange(logits.shape[-1]) == tokens[..., None]
    chosen = jnp.sum(jnp.where(is_token, logits, 0.0), axis=-1)
    return jnp.where(masked, chosen - logsumexp(logits), 0.0)


def token_kl(log_p: Float[Array, "*B V"], log_q: Float[Array, "*B V"]) -> Float[Array, "*B"]:
    """KL(p || q) of every token, in nats; 0 where p is 0."""
    p = jnp.exp(log_p)
    return row_sum(jnp.where(p > 0, p * (log_p - log_q), 0.0))


def diffusion_weights(
    masked: Bool[Array, "B T"], answer: Bool[Array, "B T"], weight: Float[Array, "B"]
) -> Float[Array, "B T"]:
    """Weighs tokens in the loss of their sequence: weight / answer length where masked.

    The loss bounds the negative log-likelihood per token, in nats. With the whole sequence as the
    answer it is that of pre-training, otherwise that of fine-tuning. The mean over a batch of whole
    sequences is MDLM's mean over all tokens.

    Source: LLaDA (3), LLaDA (5); MDLM (10); Sedykh (2).

    Args:
      weight: of the sequence, from its noise level.
    """
    return masked * (weight / answer_length(answer))[:, None]


def causal_weights(counted: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    """Weighs tokens so that a sequence's loss is the mean over those that count."""
    return counted / answer_length(counted)[:, None]


def answer_length(answer: Bool[Array, "B T"]) -> Int[Array, "B"]:
    """Answer tokens, at least 1: a sequence without an answer has no loss to divide."""
    return jnp.maximum(jnp.sum(answer, axis=1), 1)


def next_tokens(
    tokens: Int[Array, "B T"], answer: Bool[Array, "B T"], valid: Bool[Array, "B T"] | None
) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
    """What a causal model predicts at each position, and where that is an answer token.

    Nothing predicts the first token of a sequence, nor one whose left neighbour is padding.
    """
    counted = answer[:, 1:] if valid is None else answer[:, 1:] & valid[:, :-1]
    return jnp.roll(tokens, -1, axis=1), jnp.pad(counted, ((0, 0), (0, 1)))


def skip_rate(gates: Float[Array, "L B"]) -> Float[Array, "B"]:
    """DIALS (9): alpha, the share of layers that a sequence skipped. `gates` are 1 where it ran."""
    return 1.0 - jnp.mean(gates, axis=0)


def skip_loss(alpha: Float[Array, "B"], target: float) -> Float[Array, "B"]:
    """DIALS (8): |alpha - alpha_target|."""
    return jnp.abs(alpha - target)


def dials_loss(
    cross_entropy: Float[Array, "B"],
    num_answer: Int[Array, "B"],
    num_masked: Int[Array, "B"],
    alpha: Float[Array, "B"],
    p_mask: Float[Array, "B"],
    cfg: ObjectiveConfig,
) -> Float[Array, "B"]:
    """DIALS (10): (CE / answer length + lambda |alpha - alpha_target|) / p_mask, per sequence.

    A sequence without a masked token contributes nothing: its skip loss would be weighed by up to
    1 / min_mask_ratio although its routers saw nothing.

    Args:
      cross_entropy: sum over the masked tokens, in nats.
      alpha: `skip_rate`.
      p_mask: the probability with which tokens were masked.
      cfg: lambda, alpha_target, and whether the skip loss is divided by p_mask; without, it is the
        ablation of DIALS, Figure 4.
    """
    token_loss = cross_entropy / num_answer
    layer_loss = cfg.skip_weight * skip_loss(alpha, cfg.target_skip_rate)
    if cfg.scale_skip_by_mask_ratio:
        loss = (token_loss + layer_loss) / p_mask
    else:
        loss = token_loss / p_mask + layer_loss
    return jnp.where(num_masked > 0, loss, 0.0)
