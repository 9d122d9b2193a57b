"""MDLM's sampler as its authors published it, for comparison with their numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from dials_jax.caching.canvas import CanvasModel
from dials_jax.models import transformer
from dials_jax.sampling.ancestral import EPS, Ancestral, AncestralState, call_model
from dials_jax.sampling.loop import append_call, start_record

UNIFORM_BITS = 24  # of the published noise


class Published:
    """The sampler of the authors' code: every step draws every masked token anew, or [MASK].

    A draw is the largest of q / E, for noise E = -log u with u on a grid of 2^-24. Tokens that are
    improbable beside [MASK] then nearly vanish. What is left after the last step takes its most
    probable token, in one call more. Source: `ddpm_cache` of kuleshov-group/mdlm. There a step
    without change reuses the call before it, which changes no result and is left out.
    """

    def __init__(self, sampler: Ancestral, net: CanvasModel, prompt_length: int, keys: jax.Array):
        self.sampler, self.net, self.prompt_length, self.keys = sampler, net, prompt_length, keys
        self.num_steps = sampler.steps

    def start(self, canvas: Int[Array, "B T"], num_layers: int) -> AncestralState:
        record = start_record(self.num_steps + 1, num_layers, canvas.shape[0])
        zero = jnp.asarray(0, jnp.int32)
        return AncestralState(canvas, zero, jnp.zeros(canvas.shape[0], jnp.int32), None, record)

    def run(self, state: AncestralState, stop: Int[Array, ""] | None = None) -> AncestralState:
        """All steps before `stop` (None: all), and the call after the last of all."""
        stop = jnp.asarray(self.num_steps if stop is None else stop, jnp.int32)
        stop = jnp.where(stop == self.num_steps, stop + 1, stop)
        return lax.while_loop(lambda s: s.step < stop, self.advance, state)

    def advance(self, state: AncestralState) -> AncestralState:
        cfg, prompt_length = self.net.cfg, self.prompt_length
        t = jnp.asarray(self.sampler.times, jnp.float32)[state.step]
        time = jnp.broadcast_to(t, state.tokens.shape[:1])
        answer = state.tokens[:, prompt_length:]
        index = self.net.positions(prompt_length, self.sampler.length)
        out = call_model(self.net, state.tokens, state.step, time, index)

        def row(xs):  # one after the other: these arrays are as wide as the vocabulary
            h, tokens, key, time = xs
            logits = transformer.head_logits(cfg, self.net.params, h[None], time[None])[0]
            new = self.draw_tokens(
                transformer.suppress_mask_token(cfg, logits), t, state.step, key
            ).astype(tokens.dtype)
            return jnp.where(transformer.is_masked(cfg, tokens), new, tokens)

        new = lax.map(row, (out.h, answer, self.keys, time))
        tokens = state.tokens.at[:, prompt_length:].set(new)
        share = jnp.mean(transformer.is_masked(cfg, answer), axis=1)
        record = append_call(state.record, out.gates, share, 0, state.step)
        return AncestralState(tokens, state.step + 1, state.calls + 1, None, record)

    def draw_tokens(
        self, logits: Float[Array, "G V"], t: Float[Array, ""], step: Int[Array, ""], key: jax.Array
    ) -> Int[Array, "G"]:
        """A token or [MASK] for every place; after the last step, the most probable token."""
        s = t - np.float32((1 - EPS) / self.num_steps)
        q = (jax.nn.softmax(logits) * (t - s)).at[:, self.net.cfg.mask_id].set(s)
        noise = coarse_exponential(jax.random.fold_in(key, step), q.shape)
        return jnp.argmax(jnp.where(step == self.num_steps, logits, q / noise), axis=-1)


def coarse_exponential(key: jax.Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """-log u for u on the grid of 24 bits on which PyTorch draws float32 numbers."""
    u = (jax.random.bits(key, shape) >> (32 - UNIFORM_BITS)).astype(jnp.float32)
    return 1e-10 - jnp.log(u * 2.0**-UNIFORM_BITS + 1e-10)
