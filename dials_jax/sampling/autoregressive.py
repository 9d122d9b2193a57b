"""Autoregressive decoding: the baseline that masked diffusion is measured against.

The prompts run once and leave their keys and values; then every model call runs one token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
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
from dials_jax.nn.policy import Policy, skips_the_same
from dials_jax.sampling.sampler import CallRecord, log_probability_of, start_record
from dials_jax.sampling.trajectory import append_canvas


@dataclass(frozen=True)
class Autoregressive(Typed):
    """Settings of decoding from left to right, for causal models.

    A sequence ends at its first end of text; the rest is filled with end of text. Decoding stops
    when all sequences have ended.

    Attributes:
      max_new_tokens: tokens to generate.
      temperature: of the distribution that tokens are drawn from; 0 takes the most probable.
    """

    cfg_scale = 0.0
    takes_schedule = False
    one_program = True
    gives_log_probs = True
    gives_trajectory = True

    max_new_tokens: int
    temperature: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "max_new_tokens")
        require(self.temperature >= 0, f"temperature={self.temperature} must not be negative")

    @property
    def gen_length(self) -> int:
        return self.max_new_tokens

    def with_length(self, gen_length: int) -> Autoregressive:
        return replace(self, max_new_tokens=gen_length)

    def check(
        self,
        cfg: ModelConfig,
        present: Bool[np.ndarray, "B P"],
        policy: Policy | None,
        cache: Cache | None,
    ) -> None:
        require(
            cfg.causal,
            f"Autoregressive is for causal models; give this one ({cfg.model_type}) "
            "Confidence or Dream",
        )
        require(cache is None, "Autoregressive keeps its own keys and values; leave out `cache`")
        # Otherwise a layer would lack the keys of the tokens that skipped it.
        require(
            skips_the_same(policy, cfg.num_layers),
            "Autoregressive skips the same layers for every token; give Static, or no policy",
        )
        require(
            bool(present.any(axis=1).all()),
            "a prompt is empty; begin it with a token such as end of text",
        )

    def blank_id(self, cfg: ModelConfig) -> int:
        """The token that also fills the canvas after the end of a sequence."""
        return cfg.pad_id if cfg.eos_id is None else cfg.eos_id

    def count_steps(self, cache: Cache) -> int:
        return self.max_new_tokens

    def make_steps(
        self, net: CanvasModel, prompt_length: int, keys: jax.Array, cache: Cache
    ) -> DecodingSteps:
        return DecodingSteps(self, net, prompt_length, keys)

    def work(self, cfg: ModelConfig, cache: Cache, prompt_length: int) -> list[Work]:
        """The first call runs the prompts, the others one token."""
        return [Work((n,) * cfg.num_layers, 1) for n in (prompt_length, 1)]


class DecodingState(NamedTuple):
    tokens: Int[Array, "B T"]
    ended: Bool[Array, "B"]
    num_new: Int[Array, ""]  # tokens so far, as many as model calls
    cache_state: PyTree
    record: CallRecord


class DecodingSteps:
    """One token per sequence and step, in one run."""

    def __init__(
        self, sampler: Autoregressive, net: CanvasModel, prompt_length: int, keys: jax.Array
    ):
        self.sampler, self.net, self.prompt_length, self.keys = sampler, net, prompt_length, keys

    def start(self, canvas: Int[Array, "B T"], num_layers: int) -> DecodingState:
        num_sequences, zero = canvas.shape[0], jnp.asarray(0, jnp.int32)
        record = start_record(self.sampler.max_new_tokens, num_layers, num_sequences)
        return DecodingState(canvas, jnp.zeros(num_sequences, bool), zero, None, record)

    def run(self, state: DecodingState, stop: Int[Array, ""] | None = None) -> DecodingState:
        """Takes all steps, until every sequence has ended."""
        net, most = self.net, self.sampler.max_new_tokens

        def is_due(state: DecodingState) -> Bool[Array, ""]:
            return (state.num_new < most) & ~jnp.all(state.ended)

        def run_step(state: DecodingState) -> DecodingState:
            at = self.prompt_length + state.num_new - 1
            out = net.run_range(state.tokens, at, 1, state.num_new, state.cache_state)
            state = state._replace(cache_state=out.cache_state)
            return self.append_token(state, out.h[:, 0], net.depth_of_range(at, 1))

        out = net.run_range(state.tokens, 0, self.prompt_length, state.num_new, net.init_cache())
        state = state._replace(cache_state=out.cache_state)
        depth = net.depth_of_range(0, self.prompt_length)
        state = self.append_token(state, out.h[:, -1], depth)
        state = lax.while_loop(is_due, run_step, state)
        record = state.record._replace(
            nfe=state.num_new,
            own=self.not_ended(state.tokens[:, self.prompt_length :]).T,
            gates=jnp.broadcast_to(out.gates, (most, *out.gates.shape)),
            variant=jnp.minimum(jnp.arange(most), 1),
            step=jnp.arange(most),
        )
        return state._replace(record=record)

    def not_ended(self, answer: Int[Array, "B G"]) -> Bool[Array, "B G"]:
        """Where a token comes before a sequence's end, or is its end."""
        eos = self.net.cfg.eos_id
        ends = jnp.zeros(answer.shape, bool) if eos is None else answer == eos
        return jnp.cumsum(ends, axis=1) - ends == 0

    def append_token(
        self, state: DecodingState, h: Float[Array, "B D"], depth: Int[Array, "B T"] | None
    ) -> DecodingState:
        """The state with the token that `h` predicts. Args: depth: see `CanvasModel.depth`."""
        cfg, tokens = self.net.cfg, state.tokens
        keys = jax.vmap(jax.random.fold_in, (0, None))(self.keys, state.num_new)
        logits = transformer.head_logits(cfg, self.net.params, h[:, None])[:, 0]
        token = choose_tokens(logits, self.sampler.temperature, keys).astype(tokens.dtype)
        token = jnp.where(state.ended, self.sampler.blank_id(cfg), token)
        at = self.prompt_length + state.num_new
        tokens = lax.dynamic_update_slice_in_dim(tokens, token[:, None], at, axis=1)
        record = state.record
        if record.log_probs is not None:
            new = jnp.where(state.ended, jnp.nan, log_probability_of(token, logits))
            record = record._replace(log_probs=record.log_probs.at[:, at].set(new))
        record = append_canvas(record, tokens, depth, state.num_new)
        ended = state.ended if cfg.eos_id is None else token == cfg.eos_id
        num_new = state.num_new + 1
        return state._replace(tokens=tokens, ended=ended, num_new=num_new, record=record)


def choose_tokens(
    logits: Float[Array, "B V"], temperature: float, keys: jax.Array
) -> Int[Array, "B"]:
    """A token per sequence."""
    if temperature == 0:
        return jnp.argmax(logits, axis=-1)
    draw = jax.vmap(lambda key, x: jax.random.categorical(key, x, mode="high"))
    return draw(keys, logits / temperature)
