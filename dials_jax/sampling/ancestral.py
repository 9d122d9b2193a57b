"""MDLM's sampler: every masked token is revealed at a random time, independent of the model.

So the tokens that each step reveals are drawn before the first model call. A call computes logits
at these tokens only, and a step that reveals nothing needs no call: the distribution is that of
ancestral sampling, exactly. Source: Sahoo et al. 2024, "Simple and Effective Masked Diffusion
Language Models", section 3.2; Zheng et al. 2024, "Masked Diffusion Models are Secretly
Time-Agnostic Masked Models", section 4 (first hitting).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, sqrt
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt

from dials_jax.caching.cache import Cache, Work
from dials_jax.caching.canvas import CanvasModel
from dials_jax.config import ModelConfig, Typed, require_positive
from dials_jax.errors import require
from dials_jax.models import transformer
from dials_jax.nn.kernels.row_sums import row_softmax
from dials_jax.nn.policy import Policy
from dials_jax.nn.stack import StackOutput
from dials_jax.sampling.confidence import gumbel_like
from dials_jax.sampling.sampler import (
    CallRecord,
    Steps,
    append_call,
    log_probability_of,
    start_record,
)
from dials_jax.sampling.trajectory import append_canvas
from dials_jax.sharding import constrain_batch

Precision = Literal["exact", "float32"]

EPS = 1e-5  # the time at which the steps end; the last step reveals all that is still masked
# Upper bound on extra calls: up to this many sequences may each overflow their slots at every call.
# With the default number of slots this is never reached.
MAX_FULL = 8
TIMES, TOKENS = 0, 1  # folded into a sequence's key: what the draws are for


@dataclass(frozen=True)
class Ancestral(Typed):
    """Settings of the sampler.

    The time t is the probability that a token is masked. It falls from 1 to 1e-5 in equal steps,
    and each masked token is revealed by the step whose interval holds the token's random time.

    Attributes:
      length: tokens to generate.
      steps: denoising steps.
      precision: `exact`, or `float32`: the published sampler, whose low-precision noise favours
        probable tokens. It gives lower perplexity and less entropy; for published numbers only.
      first_hitting: one token per sequence and model call, each at its exact time: the limit of
        ever more steps. `steps` must equal `length`.
      slots: tokens that a model call reveals per sequence at most; a step with more in any
        sequence takes another call. None: enough for nearly every step.
    """

    cfg_scale = 0.0
    takes_schedule = True
    one_program = False
    gives_log_probs = True
    gives_trajectory = True

    length: int
    steps: int
    precision: Precision = "exact"
    first_hitting: bool = False
    slots: int | None = None

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "length", "steps")
        require(self.slots is None or self.slots > 0, f"slots={self.slots} must be positive")
        require(
            not self.first_hitting or self.precision == "exact",
            "first_hitting=True is exact; leave out precision='float32'",
        )
        require(
            not self.first_hitting or self.steps == self.length,
            f"first_hitting=True takes one step per token; set steps={self.length}",
        )

    @property
    def gen_length(self) -> int:
        return self.length

    @property
    def times(self) -> Float[np.ndarray, "{self.steps}+1"]:
        return np.linspace(1, EPS, self.steps + 1)

    @property
    def num_slots(self) -> int:
        """Tokens that one model call can reveal per sequence.

        A step reveals `length / steps` on average, and rarely five deviations more.
        """
        if self.slots is not None or self.first_hitting:
            return self.slots or 1
        mean = self.length / self.steps
        return min(self.length, 8 * ceil((mean + 5 * sqrt(mean)) / 8))

    def with_length(self, gen_length: int) -> Ancestral:
        steps = gen_length if self.steps == self.length else self.steps
        return replace(self, length=gen_length, steps=steps)

    def check(
        self,
        cfg: ModelConfig,
        present: Bool[np.ndarray, "B P"],
        policy: Policy | None,
        cache: Cache | None,
    ) -> None:
        cfg.require_mask()
        require(
            cache is None,
            "Ancestral reveals tokens all over the canvas, so nothing can be kept between its "
            "steps; leave out `cache`",
        )

    def blank_id(self, cfg: ModelConfig) -> int:
        return cfg.mask_id

    def count_steps(self, cache: Cache) -> int:
        return self.steps

    def make_steps(
        self, net: CanvasModel, prompt_length: int, keys: jax.Array, cache: Cache
    ) -> Steps:
        kind = ExactSteps if self.precision == "exact" else PublishedSteps
        return kind(self, net, prompt_length, keys)

    def work(self, cfg: ModelConfig, cache: Cache, prompt_length: int) -> list[Work]:
        total = prompt_length + self.length
        head = self.num_slots if self.precision == "exact" else self.length
        return [Work((total,) * cfg.num_layers, head, prompt_length)]


class RevealPlan(NamedTuple):
    """Which tokens each step reveals. A sequence's calls are those of its steps that reveal any.

    Attributes:
      step: that reveals a token; -1 in the prompt.
      order: the answer's positions in the order of revealing.
      before: how many of them earlier steps reveal.
      calls_before: the sequence's model calls before each step, and in all.
      time: of each step, for models that are told it.
    """

    step: Int[Array, "B T"]
    order: Int[Array, "B G"]
    before: Int[Array, "B steps+1"]
    calls_before: Int[Array, "B steps+1"]
    time: Float[Array, "B steps"]


def draw_reveal_plan(sampler: Ancestral, keys: jax.Array, prompt_length: int) -> RevealPlan:
    """Draws every token's time, with all 32 bits: steps may be as short as 2^-10, or shorter."""
    draw = jax.vmap(
        lambda key: jax.random.bits(jax.random.fold_in(key, TIMES), (sampler.length,), jnp.uint32)
    )
    drawn = draw(keys)
    order = jnp.argsort(drawn, axis=1, descending=True, stable=True)
    if sampler.first_hitting:
        step = jnp.argsort(order, axis=1)
        sorted_times = jnp.take_along_axis(drawn, order, axis=1)
        time = (sorted_times.astype(jnp.float32) + 0.5) * 2.0**-32
    else:
        step = step_of(sampler.times, drawn)
        time = jnp.broadcast_to(sampler.times[:-1], (drawn.shape[0], sampler.steps))
    sorted_steps, numbers = jnp.take_along_axis(step, order, axis=1), jnp.arange(sampler.steps + 1)
    before = jax.vmap(lambda steps: jnp.searchsorted(steps, numbers))(sorted_steps)
    calls = -(-jnp.diff(before, axis=1) // sampler.num_slots)
    return RevealPlan(
        jnp.pad(step, ((0, 0), (prompt_length, 0)), constant_values=-1),
        prompt_length + order,
        before,
        jnp.pad(jnp.cumsum(calls, axis=1), ((0, 0), (1, 0))),
        time.astype(jnp.float32),
    )


def step_of(times: Float[np.ndarray, "_"], drawn: UInt[Array, "B G"]) -> Int[Array, "B G"]:
    """The step whose interval [s, t) holds a time in units of 2^-32; the last has all below it.

    So a token that is masked at t is revealed by s with probability (t - s) / t.
    """
    inner = np.round(times[-2:0:-1] * 2.0**32).astype(np.uint32)  # between two steps; ascending
    below = jnp.searchsorted(jnp.asarray(inner), drawn, side="right")
    return (len(inner) - below).astype(jnp.int32)


class AncestralState(NamedTuple):
    """Where the loop stands before a model call.

    Attributes:
      step: names the call in any batch.
      calls: of each sequence. In one model call, sequences may be at different steps.
    """

    tokens: Int[Array, "B T"]
    step: Int[Array, ""]
    calls: Int[Array, "B"]
    plan: RevealPlan | None
    record: CallRecord


class ExactSteps:
    """Model calls that compute logits where they reveal tokens, as functions of the state."""

    def __init__(self, sampler: Ancestral, net: CanvasModel, prompt_length: int, keys: jax.Array):
        self.sampler, self.net, self.prompt_length, self.keys = sampler, net, prompt_length, keys
        self.num_steps = sampler.steps

    def start(self, canvas: Int[Array, "B T"], num_layers: int) -> AncestralState:
        sampler, num_sequences = self.sampler, canvas.shape[0]
        most = sampler.steps
        if not sampler.first_hitting:  # calls for more than fits into a sequence's slots
            most += min(num_sequences, MAX_FULL) * ((sampler.length - 1) // sampler.num_slots)
        plan = draw_reveal_plan(sampler, self.keys, self.prompt_length)
        calls, record = (
            constrain_batch(jnp.zeros(num_sequences, jnp.int32)),
            start_record(
                most, num_layers, num_sequences, observed=self.net.start_observing(canvas)
            ),
        )
        return AncestralState(canvas, jnp.asarray(0, jnp.int32), calls, plan, record)

    def run(self, state: AncestralState, stop: Int[Array, ""] | None = None) -> AncestralState:
        """The model calls of all steps before `stop`; None: of all."""
        stop = jnp.asarray(self.num_steps if stop is None else stop, jnp.int32)
        until = state.plan.calls_before[:, stop]

        def advance(state: AncestralState) -> AncestralState:
            after = self.advance(state, until)
            return after._replace(step=jnp.minimum(after.step, stop - 1))

        state = lax.while_loop(lambda s: jnp.any(s.calls < until), advance, state)
        return state._replace(step=stop)

    def advance(self, state: AncestralState, until: Int[Array, "B"]) -> AncestralState:
        """One model call, and the tokens it reveals in the sequences that do not wait."""
        cfg, plan = self.net.cfg, state.plan
        due = jnp.sum(plan.calls_before <= state.calls[:, None], axis=1) - 1
        step = jnp.minimum(due, self.num_steps - 1)  # a finished sequence has no step due
        index, fresh = self.next_revealed(state, step)
        own = state.calls < until
        fresh &= own[:, None]
        # Of several calls of a step, each sees the canvas as it was before the step.
        hidden = plan.step >= due[:, None]
        seen = jnp.where(hidden, cfg.mask_id, state.tokens)
        time = jnp.take_along_axis(plan.time, step[:, None], axis=1)[:, 0]
        out = call_model(self.net, seen, state.step, time, index)
        logits = transformer.head_logits(cfg, self.net.params, out.h, time)
        new = draw_tokens(cfg, logits, token_keys(self.keys, index - self.prompt_length))
        at = jnp.where(fresh, index, seen.shape[1])
        tokens = write_tokens(state.tokens, at, new)
        share = jnp.mean(hidden[:, self.prompt_length :], axis=1)
        observed = self.net.observe(state.record.observed, out.observed, step, own)
        record = append_call(state.record, out.gates, share, 0, state.step, own, observed)
        if record.log_probs is not None:
            log_probs = log_probability_of(new, transformer.apply_subs(cfg, logits))
            record = record._replace(log_probs=write_tokens(record.log_probs, at, log_probs))
        record = append_canvas(record, tokens, self.net.depth_of_range(0, self.net.length))
        calls = jnp.minimum(state.calls + 1, until)
        return AncestralState(tokens, state.step + 1, calls, plan, record)

    def next_revealed(
        self, state: AncestralState, step: Int[Array, "B"]
    ) -> tuple[Int[Array, "B W"], Bool[Array, "B W"]]:
        """Positions that each sequence's next call reveals; False at slots that stay empty."""
        plan, slots = state.plan, self.sampler.num_slots

        def of_step(x, add=0):
            return jnp.take_along_axis(x, step[:, None] + add, axis=1)

        first = of_step(plan.before) + slots * (state.calls[:, None] - of_step(plan.calls_before))
        rank = first + jnp.arange(slots)  # in the order of revealing
        fresh = rank < of_step(plan.before, 1)
        rank = jnp.clip(rank, 0, self.sampler.length - 1)
        return jnp.take_along_axis(plan.order, rank, axis=1), fresh


def call_model(
    net: CanvasModel,
    tokens: Int[Array, "B T"],
    step: Int[Array, ""],
    time: Float[Array, "B"],
    index: Int[Array, "B W"],
) -> StackOutput:
    """Runs the whole canvas, for the states that predict the tokens at `index`."""
    c = transformer.conditioning(net.cfg, net.params, time)
    net = replace(net, block_inputs=net.block_inputs._replace(c=c))
    wanted = jnp.maximum(index - net.logit_shift, 0)  # nothing predicts the canvas's first token
    return net.run_range(tokens, 0, net.length, step, output_positions=wanted)


def draw_tokens(
    cfg: ModelConfig, logits: Float[Array, "B W V"], keys: jax.Array
) -> Int[Array, "B W"]:
    """A token for every slot, never [MASK]."""
    return jnp.argmax(
        transformer.suppress_mask_token(cfg, logits) + gumbel_like(logits, keys), axis=-1
    )


def token_keys(keys: jax.Array, position: Int[Array, "B W"]) -> jax.Array:
    """One key per position of the answer, which is revealed once: the step is not folded in.

    Two schedules then draw with the same noise, and differ only by their models' logits.
    """
    of_sequence = jax.vmap(jax.random.fold_in, (0, None))(keys, TOKENS)
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(of_sequence, position)


def write_tokens(
    tokens: Shaped[Array, "B T"], index: Int[Array, "B W"], new: Shaped[Array, "B W"]
) -> Shaped[Array, "B T"]:
    """Writes tokens, or numbers of them, at their positions; one beyond the canvas is dropped."""
    write = jax.vmap(lambda sequence, at, x: sequence.at[at].set(x, mode="drop"))
    return write(tokens, index, new.astype(tokens.dtype))


# ------------------------------------------------------------------- as its authors published it

UNIFORM_BITS = 24  # of the published noise


class PublishedSteps:
    """The sampler of the authors' code: every step draws every masked token again, or [MASK].

    A draw is the largest of q / E, for noise E = -log u with u on a grid of 2^-24. Tokens much
    less probable than [MASK] then almost never appear. Positions still masked after the last step
    take the most probable token, in one more call. Source: `ddpm_cache` of kuleshov-group/mdlm,
    which reuses the last call after a step without change; that alters no result and is left out.
    """

    def __init__(self, sampler: Ancestral, net: CanvasModel, prompt_length: int, keys: jax.Array):
        self.sampler, self.net, self.prompt_length, self.keys = sampler, net, prompt_length, keys
        self.num_steps = sampler.steps

    def start(self, canvas: Int[Array, "B T"], num_layers: int) -> AncestralState:
        observed = self.net.start_observing(canvas)
        record = start_record(self.num_steps + 1, num_layers, canvas.shape[0], observed=observed)
        zero = jnp.asarray(0, jnp.int32)
        calls = constrain_batch(jnp.zeros(canvas.shape[0], jnp.int32))
        return AncestralState(canvas, zero, calls, None, record)

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

        def reveal(xs):  # one after the other: these arrays are as wide as the vocabulary
            h, tokens, key, time = xs
            logits = transformer.head_logits(cfg, self.net.params, h[None], time[None])[0]
            new = self.draw_tokens(
                transformer.suppress_mask_token(cfg, logits), t, state.step, key
            ).astype(tokens.dtype)
            new = jnp.where(transformer.is_masked(cfg, tokens), new, tokens)
            if state.record.log_probs is None:
                return new, None
            return new, log_probability_of(new, transformer.apply_subs(cfg, logits))

        new, log_probs = lax.map(reveal, (out.h, answer, self.keys, time))
        tokens = state.tokens.at[:, prompt_length:].set(new)
        share = jnp.mean(transformer.is_masked(cfg, answer), axis=1)
        own = jnp.ones(len(tokens), bool)
        observed = self.net.observe(state.record.observed, out.observed, state.step, own)
        record = append_call(state.record, out.gates, share, 0, state.step, observed=observed)
        if log_probs is not None:
            before = record.log_probs[:, prompt_length:]
            log_probs = jnp.where(new != answer, log_probs, before)
            known = record.log_probs.at[:, prompt_length:].set(log_probs)
            record = record._replace(log_probs=known)
        record = append_canvas(record, tokens, self.net.depth_of_range(0, self.net.length))
        return AncestralState(tokens, state.step + 1, state.calls + 1, None, record)

    def draw_tokens(
        self, logits: Float[Array, "G V"], t: Float[Array, ""], step: Int[Array, ""], key: jax.Array
    ) -> Int[Array, "G"]:
        """A token or [MASK] for every position; after the last step, the most probable token."""
        s = t - np.float32((1 - EPS) / self.num_steps)
        q = (row_softmax(logits) * (t - s)).at[:, self.net.cfg.mask_id].set(s)
        noise = coarse_exponential(jax.random.fold_in(key, step), q.shape)
        return jnp.argmax(jnp.where(step == self.num_steps, logits, q / noise), axis=-1)


def coarse_exponential(key: jax.Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """-log u for u on the grid of 24 bits on which PyTorch draws float32 numbers."""
    u = (jax.random.bits(key, shape, jnp.uint32) >> (32 - UNIFORM_BITS)).astype(jnp.float32)
    return 1e-10 - jnp.log(u * 2.0**-UNIFORM_BITS + 1e-10)
