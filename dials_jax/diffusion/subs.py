"""What a masked diffusion model says about the clean tokens (SUBS)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

NEVER = -1e6  # the logarithm of "never", finite as in the published code


def subs_log_probs(
    logits: Float[Array, "*B T V"], tokens: Int[Array, "*B T"], mask_id: int
) -> Float[Array, "*B T V"]:
    """log p(x_0 | x_t): [MASK] is never predicted, and a token that is shown stays as it is.

    Source: MDLM, section 3.2.3.

    Args:
      tokens: x_t, which may hold [MASK].
    """
    ids = jnp.arange(logits.shape[-1])
    logits = logits.astype(jnp.float32) + jnp.where(ids == mask_id, NEVER, 0.0)
    log_p = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    shown = jnp.where(ids == tokens[..., None], 0.0, NEVER)
    return jnp.where(tokens[..., None] == mask_id, log_p, shown)
