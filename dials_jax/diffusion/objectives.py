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


def diffusion_loss(
    cross_entropy: Float[Array, "B"],
    answer_length: Int[Array, "B"],
    ratio: Float[Array, "B"],
) -> Float[Array, "B"]:
    """LLaDA's loss of a row: sum(CE) / answer_length / p, in nats a token.

    It bounds the negative log-likelihood a token. With the whole row as the answer this is the
    pre-training loss, otherwise the fine-tuning loss (Nie et al. 2025, equations 3 and 5).

    Args:
      cross_entropy: summed over the masked tokens.
      ratio: the probability p with which tokens were masked.
    """
    return cross_entropy / jnp.maximum(answer_length, 1) / ratio


def dials_loss(
    cross_entropy: Float[Array, "B"],
    answer_length: Int[Array, "B"],
    num_masked: Int[Array, "B"],
    ratio: Float[Array, "B"],
    skip_rate: Float[Array, "B"],
    cfg: ObjectiveConfig,
) -> Float[Array, "B"]:
    """(CE / answer_length + lambda |alpha - alpha_target|) / p (DIALS, equations 8 to 10).

    A row without a masked token contributes nothing: its skip loss would be weighed by up to
    1 / min_ratio although its routers saw nothing.

    Args:
      skip_rate: alpha, the mean over layers of the binary skip gate.
    """
    skip_loss = cfg.skip_weight * jnp.abs(skip_rate - cfg.target_skip_rate)
    if cfg.scale_skip_by_mask_ratio:
        skip_loss = skip_loss / ratio
    loss = diffusion_loss(cross_entropy, answer_length, ratio) + skip_loss
    return jnp.where(num_masked > 0, loss, 0.0)
