"""A model at work on one batch of canvases: what a cache runs, window by window."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree

from dials_jax import trees
from dials_jax.config import ModelConfig
from dials_jax.diffusion.guidance import with_unconditional
from dials_jax.models import transformer
from dials_jax.nn.block import BlockInputs
from dials_jax.nn.kv import KV, Slots, gather
from dials_jax.nn.modules import form_of
from dials_jax.nn.policy import Denoising, Policy
from dials_jax.nn.stack import Executor, StackOutput, run_stack
from dials_jax.sharding import constrain_batch
from dials_jax.skipping.observing import BatchObserver, seen_in, state_products


@dataclass(frozen=True)
class CanvasModel:
    """A model, its policy and the canvases of a batch.

    Under guidance every canvas is there twice: R is 2B, the conditional ones first.

    Attributes:
      block_inputs: of the whole canvas; positions and padding do not change while it is filled.
      sequence_keys: one per sequence, for random policies.
      prompt_mask: True at prompts, hidden from the unconditional half; None without guidance.
      prompt_length: no token before this position is ever masked; 0 under guidance.
      observer: measures the hidden states of every call on the whole canvas; None: nothing does.
      keeps_depth: calls say how many layers each position went through; see `depth`.
    """

    cfg: ModelConfig
    params: trees.Params
    policy: Policy | None
    executor: Executor
    block_inputs: BlockInputs
    sequence_keys: PyTree
    prompt_mask: Bool[Array, "B T"] | None
    prompt_length: int
    observer: BatchObserver | None = None
    keeps_depth: bool = False

    @property
    def logit_shift(self) -> int:
        """A token is predicted by the position this many to its left: 1 after a right shift."""
        return int(self.cfg.right_shift)

    @property
    def length(self) -> int:
        return self.block_inputs.slots.index.shape[1]

    @property
    def num_sequences(self) -> int:
        return self.block_inputs.slots.index.shape[0]

    def with_unconditional(self, tokens: Int[Array, "B T"]) -> Int[Array, "R T"]:
        """What the model sees of the canvases."""
        if self.prompt_mask is None:
            return tokens
        return with_unconditional(tokens, self.prompt_mask, self.cfg.mask_id)

    def positions(self, start: Int[Array, ""] | int, size: int) -> Int[Array, "R T"]:
        """The same `size` positions from `start` on, for every sequence."""
        return jnp.broadcast_to(start + jnp.arange(size), (self.num_sequences, size))

    def window(
        self, index: Int[Array, "R T"], active: Bool[Array, "R T"] | None = None
    ) -> BlockInputs:
        """The inputs of the tokens at `index`."""
        angles = gather(self.block_inputs.angles, index)
        return self.block_inputs._replace(angles=angles, slots=Slots(index, active))

    def depth(
        self,
        slots: Slots,
        num_layers: int | None = None,
        so_far: Int[Array, "R T"] | None = None,
    ) -> Int[Array, "R T"] | None:
        """After how many layers each position of the canvas leaves a call; None: not kept.

        Args:
          slots: the positions that go through `num_layers` layers (None: all) at least.
          so_far: of all positions before; None: those outside the window go through no layer.
        """
        if not self.keeps_depth:
            return None
        shape = self.num_sequences, self.length
        so_far = jnp.zeros(shape, jnp.int32) if so_far is None else so_far
        reached = self.cfg.num_layers if num_layers is None else num_layers
        active = True if slots.active is None else slots.active
        reached = jnp.broadcast_to(jnp.where(active, reached, 0), slots.index.shape)
        return jax.vmap(lambda x, at, n: x.at[at].max(n))(so_far, slots.index, reached)

    def depth_of_range(
        self, start: Int[Array, ""] | int, size: int, end: Int[Array, ""] | None = None
    ) -> Int[Array, "R T"] | None:
        """`depth` where the positions from `start` on, before `end`, go through all layers."""
        if not self.keeps_depth:
            return None
        index = self.positions(start, size)
        return self.depth(Slots(index, None if end is None else index < end))

    def embed(self, tokens: Int[Array, "R T"], window: BlockInputs) -> Array:
        return transformer.embed(self.cfg, self.params, tokens, window)

    def is_masked(self, tokens: Int[Array, "R T"], index: Int[Array, "R T"]) -> Bool[Array, "R T"]:
        """Where a token is [MASK] and not padding."""
        masked = transformer.is_masked(self.cfg, tokens)
        valid = self.block_inputs.mask.valid
        if valid is None:
            return masked
        return masked & jnp.take_along_axis(valid, index, axis=1)

    def run_layers(
        self,
        h: Array,
        window: BlockInputs,
        masked: Bool[Array, "R T"],
        step: Int[Array, "..."],
        cache_state: PyTree = None,
        *,
        span: tuple[int, int] | None = None,
        contiguous: bool = False,
        prompt_length: int = 0,
        output_positions: Int[Array, "R W"] | None = None,
        policy_state: PyTree = None,
        observe: Callable[[Array, Array], PyTree] | None = None,
        fills_cache: Bool[Array, "..."] | None = None,
    ) -> StackOutput:
        """Runs the layers of `span` on the tokens of a window.

        Tokens that are not active in the window do not vote. In a call that fills an empty part of
        a cache no gate skips a layer: later calls would attend to keys that were never computed.

        Args:
          contiguous: the window is one range, the same in every sequence.
          prompt_length: no token of the window before this one is masked.
          output_positions: in the window, of the tokens whose states are asked for; None: all.
          policy_state: what the span before left; None at the first layer.
          observe: see `run_stack`.
          fills_cache: whether the call does that; None: the first one does.
        """
        fills_cache = step == 0 if fills_cache is None else fills_cache
        active = window.slots.active
        masked = masked if active is None else masked & active
        return run_stack(
            transformer.layer_of(self.cfg, form_of(self.params), contiguous=contiguous),
            self.params["layers"],
            h,
            window._replace(output_positions=output_positions),
            self.policy,
            Denoising(
                masked,
                step,
                self.sequence_keys,
                prompt_length,
                force_execute=None if cache_state is None else fills_cache,
            ),
            span=span,
            cache_state=cache_state,
            policy_state=policy_state,
            executor=self.executor,
            observe=observe,
        )

    def run_range(
        self,
        tokens: Int[Array, "B T"],
        start: Int[Array, ""] | int,
        size: int,
        step: Int[Array, "..."],
        cache_state: PyTree = None,
        active: Bool[Array, "R W"] | None = None,
        output_positions: Int[Array, "R _"] | None = None,
        end: Int[Array, ""] | None = None,
        fills_cache: Bool[Array, "..."] | None = None,
    ) -> StackOutput:
        """Runs all layers on the canvas's tokens from `start` on.

        Args:
          end: where the canvas ends at present; None: all of it is there.
        """
        index = self.positions(start, size)
        seen = jnp.take_along_axis(self.with_unconditional(tokens), index, axis=1)
        if end is not None:
            active = index < end if active is None else active & (index < end)
        window = self.window(index, active)
        if cache_state is None and size < self.length:
            window = window._replace(mask=window.mask.of_first(size))
        if end is not None:
            written = jnp.broadcast_to(end, self.num_sequences)
            window = window._replace(mask=replace(window.mask, written=written))
        inputs = self.embed(seen, window), window, self.is_masked(seen, index), step
        if self.observer is not None:
            return self.run_observed(tokens, *inputs, output_positions)
        return self.run_layers(
            *inputs,
            cache_state,
            contiguous=True,
            prompt_length=self.prompt_length if isinstance(start, int) and start == 0 else 0,
            output_positions=output_positions,
            fills_cache=fills_cache,
        )

    def run_observed(
        self,
        tokens: Int[Array, "B T"],
        h: Array,
        window: BlockInputs,
        masked: Bool[Array, "B T"],
        step: Int[Array, "..."],
        output_positions: Int[Array, "B _"] | None,
    ) -> StackOutput:
        """Runs all layers on the whole canvas, the last one too; `observed` is a `Seen`."""
        parts, gates, states, policy_state = [], [], [], None
        for span in self.observer.settings.spans(self.cfg.num_layers):
            out = self.run_layers(
                h,
                window,
                masked,
                step,
                span=span,
                contiguous=True,
                prompt_length=self.prompt_length,
                policy_state=policy_state,
                observe=state_products,
            )
            h, policy_state = out.h, out.policy_state
            parts.append(out.observed)
            gates.append(out.gates)
            if span[1] - 1 in self.observer.settings.change_layers:
                states.append(h[:, self.prompt_length :])
        seen = seen_in(tokens, parts, h, tuple(states))
        h = h if output_positions is None else gather(h, output_positions)
        return StackOutput(h, jnp.concatenate(gates), None, seen, policy_state)

    def start_observing(self, tokens: Int[Array, "B T"]) -> PyTree:
        """What the record holds before the first call."""
        return None if self.observer is None else self.observer.start(self.cfg, tokens)

    def observe(
        self, so_far: PyTree, seen: PyTree, step: Int[Array, "..."], own: Bool[Array, "B"]
    ) -> PyTree:
        """What the record of model calls holds of their hidden states, with one more call.

        Args: as of `BatchObserver.fold`; None without an observer.
        """
        if self.observer is None:
            return None
        written = ~transformer.is_masked(self.cfg, seen.tokens)
        return self.observer.fold(so_far, seen, written, step, own)

    def init_cache(self, span: tuple[int, int] | None = None) -> Any:
        """A cache of zeros for the layers of `span`, laid out as they are."""
        cfg, (first, last) = self.cfg, span or (0, self.cfg.num_layers)
        shape = (self.num_sequences, self.length, cfg.num_kv_heads, cfg.head_dim)

        def kv(*lead: int) -> KV:
            zeros = (jnp.zeros((*lead, *shape), cfg.dtype) for _ in KV._fields)
            return KV(*(constrain_batch(x, axis=-4, heads=-2) for x in zeros))

        if trees.is_unrolled(self.params["layers"]):
            return tuple(kv() for _ in range(first, last))
        return kv(last - first)
