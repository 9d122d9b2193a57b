"""Autoregressive decoding: the baseline that masked diffusion is measured against.

The prompts run once and leave their keys and values; then every model call runs one token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from dials_jax.caching.cache import Cache, Work
from dials_jax.caching.canvas import CanvasModel
from dials_jax.config import ModelConfig, Typed, require_positive
from dials_jax.errors import require
from dials_jax.models import transformer
from dials_jax.nn.policy import Policy
from dials_jax.sampling.loop import CallRecord
from dials_jax.skipping.policies import Static


@dataclass(frozen=True)
class Autoregressive(Typed):
    """Settings of decoding from left to right, for causal models.

    A row ends at its first end of text; the rest of it is filled with end of text, and decoding
    stops when all rows have ended.

    Attributes:
      max_new_tokens: tokens to generate.
      temperature: of the distribution that tokens are drawn from; 0 takes the most probable.
    """

    cfg_scale = 0.0

    max_new_tokens: int
    temperature: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "max_new_tokens")
        require(self.temperature >= 0, f"temperature={self.temperature} must not be negative")

    @property
    def gen_length(self) -> int:
        return self.max_new_tokens

    def check(
        self,
        cfg: ModelConfig,
        valid: Bool[np.ndarray, "B P"],
        policy: Policy | None,
        cache: Cache | None,
    ) -> None:
        """Raises: InputError for what cannot be decoded from left to right."""
        require(
            cfg.causal,
            f"Autoregressive is for causal models; give this one ({cfg.model_type}) "
            "Confidence or Dream",
        )
        require(cache is None, "Autoregressive keeps its own keys and values; leave out `cache`")
        # Elsewhere a layer would lack the keys of tokens that skipped it.
        require(
            policy is None or isinstance(policy, Static),
            "Autoregressive skips the same layers for every token; give Static, or no policy",
        )
        require(
            bool(valid.any(axis=1).all()),
            "a prompt is empty; begin it with a token such as end of text",
        )

    def work(self, cfg: ModelConfig, prompt_length: int) -> list[Work]:
        """What the two kinds of model call compute: the prompts, and one token."""
        return [Work((n,) * cfg.num_layers, 1) for n in (prompt_length, 1)]


class DecodingState(NamedTuple):
    tokens: Int[Array, "B T"]
    ended: Bool[Array, "B"]
    num_new: Int[Array, ""]  # tokens so far, as many as model calls
    cache_state: PyTree


def filler(cfg: ModelConfig) -> int:
    """What follows the end of a row."""
    return cfg.pad_id if cfg.eos_id is None else cfg.eos_id


def decode(
    sampler: Autoregressive,
    net: CanvasModel,
    canvas: Int[Array, "B T"],
    noise_keys: jax.Array,
    prompt_length: int,
) -> tuple[Int[Array, "B T"], CallRecord]:
    """Continues the prompts of a canvas that holds `filler` after them."""

    def add(state: DecodingState, h: Float[Array, "B D"]) -> DecodingState:
        """The token that `h` predicts."""
        keys = jax.vmap(jax.random.fold_in, (0, None))(noise_keys, state.num_new)
        logits = transformer.head_logits(net.cfg, net.params, h[:, None])[:, 0]
        token = choose_tokens(logits, sampler.temperature, keys).astype(canvas.dtype)
        token = jnp.where(state.ended, filler(net.cfg), token)
        at = prompt_length + state.num_new
        tokens = lax.dynamic_update_slice_in_dim(state.tokens, token[:, None], at, axis=1)
        ended = state.ended if net.cfg.eos_id is None else token == net.cfg.eos_id
        return DecodingState(tokens, ended, state.num_new + 1, state.cache_state)

    def more(state: DecodingState) -> Bool[Array, ""]:
        return (state.num_new < sampler.max_new_tokens) & ~jnp.all(state.ended)

    def step(state: DecodingState) -> DecodingState:
        at = prompt_length + state.num_new - 1
        out = net.run_range(state.tokens, at, 1, state.num_new, state.cache_state)
        return add(state._replace(cache_state=out.cache_state), out.h[:, 0])

    num_sequences, zero = canvas.shape[0], jnp.asarray(0, jnp.int32)
    out = net.run_range(canvas, 0, prompt_length, zero, net.init_cache())
    state = DecodingState(canvas, jnp.zeros(num_sequences, bool), zero, out.cache_state)
    state = lax.while_loop(more, step, add(state, out.h[:, -1]))
    record = CallRecord(
        nfe=state.num_new,
        gates=jnp.broadcast_to(out.gates, (sampler.max_new_tokens, *out.gates.shape)),
        masked_share=jnp.zeros((sampler.max_new_tokens, num_sequences)),
        variant=jnp.minimum(jnp.arange(sampler.max_new_tokens), 1),
        step=jnp.arange(sampler.max_new_tokens),
    )
    return state.tokens, record


def choose_tokens(
    logits: Float[Array, "B V"], temperature: float, keys: jax.Array
) -> Int[Array, "B"]:
    """A token a row."""
    if temperature == 0:
        return jnp.argmax(logits, axis=-1)
    one = jax.vmap(lambda key, row: jax.random.categorical(key, row, mode="high"))
    return one(keys, logits / temperature)
