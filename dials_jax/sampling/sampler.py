"""What a sampler is to `generate`, and the record of the model calls that it makes.

    generate(model, prompts, sampler=...)
      sampler.check(...)                          on the host, before anything is compiled
      canvas = prompts, then sampler.gen_length times sampler.blank_id(cfg)
      - - - - - - - - - - - - - - - - - - - - - - compiled from here on
      steps = sampler.make_steps(net, prompt_length, keys, cache)
      state = steps.start(canvas, num_layers)     before step 0
      state = steps.run(state)                    after the last step: without a schedule
      - - or, by the schedule L125,H750,L125, each `run` with the net of its model: - - - - -
      state = steps.run(state, 125)
      state = steps.run(state, 875)
      state = steps.run(state, 1000)
      - - - - - - - - - - - - - - - - - - - - - - back on the host
      state.tokens, state.record                  and their FLOPs, by sampler.work(...)

A sampler holds settings only, so that it is a static argument of compiled programs: equal settings
share a program. Any class with the members of `Sampler` is one. A sampler that fills the canvas
block by block, by the model's confidence, needs two methods only: see `loop.BlockSampler`.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from dials_jax.caching.cache import Cache, Work
from dials_jax.caching.canvas import CanvasModel
from dials_jax.config import ModelConfig
from dials_jax.errors import require
from dials_jax.nn.kernels.row_sums import logsumexp
from dials_jax.nn.policy import Policy
from dials_jax.sharding import constrain_batch


@runtime_checkable
class Steps(Protocol):
    """How a sampler fills a canvas, as functions from state to state."""

    def start(self, canvas: Int[Array, "B T"], num_layers: int) -> PyTree:
        """The state before the first step; it has `tokens` and `record`.

        Args:
          num_layers: of the deepest model, for the record.
        """

    def run(self, state: PyTree, stop: Int[Array, ""] | None = None) -> PyTree:
        """Takes the steps before number `stop`; None: all."""


@runtime_checkable
class Sampler(Protocol):
    """How a canvas is filled. Settings only: hashable.

    A sampler may arrange canvases otherwise than prompts, then blanks: see `lay_out` and
    `lay_back` of `BlockDiffusion`.

    Attributes:
      gen_length: tokens to generate.
      cfg_scale: above 0, the model sees every canvas twice: with and without its prompt.
      takes_schedule: its steps can be divided among several models.
      one_program: without a schedule, one program makes all steps, unless the sampler divides them
        itself (`loop.BlockSampler.parts`). False: the programs of a schedule make them, so that one
        compilation serves all schedules and none.
      gives_log_probs: its steps fill `CallRecord.log_probs`. False where a class does not say.
      gives_trajectory: its steps fill `CallRecord.canvases`. False where a class does not say.
    """

    gen_length: int
    cfg_scale: float
    takes_schedule: bool
    one_program: bool

    def check(
        self,
        cfg: ModelConfig,
        present: Bool[np.ndarray, "B P"],
        policy: Policy | None,
        cache: Cache | None,
    ) -> None:
        """Refuses what cannot be sampled so.

        Args:
          present: False at the prompts' padding.
          cache: None if the caller gave none.

        Raises: InputError.
        """

    def with_length(self, gen_length: int) -> Sampler:
        """The same settings for this many tokens; steps and blocks that were as many follow."""

    def blank_id(self, cfg: ModelConfig) -> int:
        """The token that fills the canvas before the first step."""

    def count_steps(self, cache: Cache) -> int:
        """The steps that a schedule divides among models; without a schedule, an upper bound."""

    def make_steps(
        self, net: CanvasModel, prompt_length: int, keys: jax.Array, cache: Cache
    ) -> Steps:
        """The steps on one batch. Args: keys: one per sequence, for the sampler's noise."""

    def work(self, cfg: ModelConfig, cache: Cache, prompt_length: int) -> list[Work]:
        """What each variant of its model calls computes per sequence, for FLOPs."""


class CallRecord(NamedTuple):
    """What every model call was. S is the most calls there could be.

    A sampler that revises tokens may make more calls than there are tokens; S is then larger, too.
    """

    nfe: Int[Array, ""]
    gates: Bool[Array, "S L R"]
    masked_share: Float[Array, "S B"]  # of the generated part, before the call
    variant: Int[Array, "S"]  # the call's number in `Sampler.work`
    step: Int[Array, "S"]  # that the call belongs to: it names the model, under a schedule
    own: Bool[Array, "S B"]  # False: made for other sequences, while this one was finished
    log_probs: Float[Array, "B T"] | None = None  # of the canvas: see `keep_log_probs`
    observed: PyTree = None  # what the hidden states were like: see `CanvasModel.observe`
    canvases: PyTree = None  # after every call: see `trajectory.keep_trajectory`


def start_record(
    num_calls: int,
    num_layers: int,
    num_sequences: int,
    num_gated: int | None = None,
    observed: PyTree = None,
) -> CallRecord:
    """An empty record.

    Args:
      num_layers: of the deepest model; the gates of others are False beyond their own.
      num_gated: sequences that the model sees: twice as many under guidance. None: as many.
      observed: what `CanvasModel.start_observing` returns.
    """
    calls = jnp.zeros(num_calls, jnp.int32)
    gates = jnp.zeros((num_calls, num_layers, num_gated or num_sequences), bool)
    share = constrain_batch(jnp.zeros((num_calls, num_sequences)), axis=1)
    own = constrain_batch(jnp.zeros(share.shape, bool), axis=1)
    gates = constrain_batch(gates, axis=2)
    return CallRecord(jnp.asarray(0, jnp.int32), gates, share, calls, calls, own, observed=observed)


def append_call(
    record: CallRecord,
    gates: Array,
    share: Array,
    variant: int,
    step: Array,
    own: Array | None = None,
    observed: PyTree = None,
) -> CallRecord:
    """The record with one more call.

    Args:
      own: see `CallRecord`; None: of every sequence.
      observed: what `CanvasModel.observe` returns.
    """
    at = record.nfe
    return record._replace(
        nfe=at + 1,
        gates=record.gates.at[at, : gates.shape[0]].set(gates.astype(bool)),
        masked_share=record.masked_share.at[at].set(share),
        variant=record.variant.at[at].set(variant),
        step=record.step.at[at].set(step),
        own=record.own.at[at].set(True if own is None else own),
        observed=observed,
    )


def keep_log_probs(state: PyTree) -> PyTree:
    """The state before the first step, whose record also holds log-probabilities of tokens.

    They are the model's log p(token) in nats at the step that wrote the token, the last one if it
    was revised: of its logits with guidance, before temperature, top_p and what else a sampler
    changes. NaN where no step has written: in prompts, and after an end of text.
    """
    unknown = constrain_batch(jnp.full(state.tokens.shape, jnp.nan, jnp.float32))
    return state._replace(record=state.record._replace(log_probs=unknown))


def log_probability_of(
    tokens: Int[Array, "*batch"], logits: Float[Array, "*batch V"]
) -> Float[Array, "*batch"]:
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return chosen - logsumexp(logits)


def require_ids(cfg: ModelConfig, **settings: tuple[int, ...]) -> None:
    """Raises: InputError for a token of a setting that the model's vocabulary lacks."""
    for name, ids in settings.items():
        for token in ids:
            require(
                0 <= token < cfg.vocab_size,
                f"{name} has {token}, outside the vocabulary of {cfg.vocab_size} tokens",
            )
