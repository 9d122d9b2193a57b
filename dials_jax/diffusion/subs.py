"""SUBS: what a masked diffusion model predicts about the clean tokens, never [MASK]."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dials_jax.nn.kernels.row_sums import logsumexp

NEVER = -1e6  # the logarithm of "never", finite as in the published code


def suppress_token(
    logits: Float[Array, "*B V"], token_id: int, value: Float[Array, "*B V"] | float = -jnp.inf
) -> Float[Array, "*B V"]:
    """Logits that never predict one token, such as [MASK]; `value` is what its logit becomes."""
    # A comparison joins its neighbours in one kernel; a scatter would not.
    return jnp.where(jnp.arange(logits.shape[-1]) == token_id, value, logits)


def subs_log_probs(
    logits: Float[Array, "*B T V"], tokens: Int[Array, "*B T"], mask_id: int
) -> Float[Array, "*B T V"]:
    """log p(x_0 | x_t): [MASK] is never predicted, and a token that is shown stays as it is.

    Source: MDLM, section 3.2.3.

    Args:
      tokens: x_t, which may hold [MASK].
    """
    ids = jnp.arange(logits.shape[-1])
    logits = logits.astype(jnp.float32)
    logits = suppress_token(logits, mask_id, logits + NEVER)
    log_p = logits - logsumexp(logits, keepdims=True)
    shown = jnp.where(ids == tokens[..., None], 0.0, NEVER)
    return jnp.where(tokens[..., None] == mask_id, log_p, shown)
