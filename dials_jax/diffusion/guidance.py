"""Classifier-free guidance: logits = u + (w + 1)(c - u), where u does not see the prompt.

A model then sees every canvas of a batch twice: B conditional ones, then B unconditional ones.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped


def with_unconditional(
    tokens: Int[Array, "B T"], prompt_mask: Bool[Array, "... T"], mask_id: int
) -> Int[Array, "R T"]:
    """The canvases, and the same with [MASK] in place of their prompts."""
    return jnp.concatenate([tokens, jnp.where(prompt_mask, mask_id, tokens)])


def repeat_batch(x: Shaped[Array, "B *rest"] | None) -> Shaped[Array, "R *rest"] | None:
    """What is the same with and without the prompt."""
    return None if x is None else jnp.concatenate([x, x])


def guide(logits: Float[Array, "R W V"], cfg_scale: float) -> Float[Array, "B W V"]:
    """The guided logits; w is `cfg_scale`."""
    conditional, unconditional = jnp.split(logits, 2)
    return unconditional + (cfg_scale + 1) * (conditional - unconditional)
