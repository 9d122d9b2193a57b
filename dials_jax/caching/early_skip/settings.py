"""ES-dLLM: unimportant tokens leave the early layers, over a cache of everything.

Most steps run the block only and drop tokens on the way: after some layers only those go on that
are confident or have changed since the cache last saw them. Now and then a step runs the whole
block, or the canvas up to the block's end, and brings the cache up to date.

Source: ES-dLLM, and its published code for the constants and the schedule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import jax.numpy as jnp

from dials_jax.caching.cache import Blocks, ForwardVariant, Number, Revealed, window_sizes
from dials_jax.caching.canvas import CanvasModel
from dials_jax.caching.early_skip.plan import EarlySkipState, Indicator, SkipPlan
from dials_jax.caching.early_skip.variants import EarlySkipVariants
from dials_jax.config import Typed, require_positive
from dials_jax.errors import require
from dials_jax.nn.kv import Slots, write


@dataclass(frozen=True)
class EarlySkip(Typed):
    """Settings of ES-dLLM.

    Attributes:
      proportions: share of the window that runs from each depth on; the first is 1.
      depths: as shares of the layers. Tokens leave on the output of layer ceil(depth * L).
      alpha: weight of confidence against change in a token's importance.
      prompt_every: every so many tokens the canvas up to the block's end is brought up to date.
      block_every: every so many tokens the whole block is; divides the block's length.
      indicator: whose change is measured: a layer's output, or its queries, keys or values.
    """

    drops_tokens = True

    proportions: tuple[float, ...] = (1.0, 0.5, 0.25)
    depths: tuple[float, ...] = (0.0, 0.125, 0.25)
    alpha: float = 0.5
    prompt_every: int = 64
    block_every: int = 4
    indicator: Indicator = "hidden"

    def __post_init__(self):
        super().__post_init__()
        p, d = self.proportions, self.depths
        require(len(p) == len(d), f"{len(p)} proportions for {len(d)} depths; give one a depth")
        require(
            p[:1] == (1.0,) and d[:1] == (0.0,),
            "proportions begin with 1 at depth 0: the first layers run the whole window",
        )
        falling = all(a > b > 0 for a, b in pairwise(p))
        rising = all(a < b < 1 for a, b in pairwise(d))
        require(falling and rising, f"proportions={p} must fall and depths={d} rise, within (0, 1)")
        require(0 <= self.alpha <= 1, f"alpha={self.alpha} must lie in [0, 1]")
        require_positive(self, "prompt_every", "block_every")

    # --------------------------------------------------------------------------- the plan

    def leave_at(self, num_layers: int) -> list[int]:
        """The layers where tokens leave."""
        first = [math.ceil(depth * num_layers) for depth in self.depths]
        require(
            first[-1] < num_layers - 1,
            f"depths={self.depths}: nothing is left to skip behind layer {first[-1]} of "
            f"{num_layers}; choose smaller ones",
        )
        require(
            len(set(first)) == len(first),
            f"depths={self.depths} fall on layers {first} of {num_layers}; keep them apart",
        )
        return first[1:]

    def plan(self, num_layers: int, blocks: Blocks) -> SkipPlan:
        few = min((blocks.max_quota or 1) + 2, blocks.length)
        kept = tuple(max(int(p * blocks.length), few) for p in self.proportions)
        layers = tuple(self.leave_at(num_layers))
        return SkipPlan(self.alpha, self.indicator, layers, self.proportions, kept)

    def kinds(self, blocks: Blocks) -> list[str | int]:
        """The kinds of model calls that this generation needs; a number is `up_to` that size."""
        refreshed = range(self.prompt_every, blocks.length * blocks.count, self.prompt_every)
        sizes = window_sizes(blocks.count)
        needed = {next(n for n in sizes if n > place // blocks.length) for place in refreshed}
        starts = range(blocks.length, blocks.length * blocks.count, blocks.length)
        unrefreshed = any(start % self.prompt_every for start in starts)
        return [
            "canvas",
            *sorted(needed),
            *["two_blocks"] * unrefreshed,
            "block",
            "skip",
            *["skip_few"] * (blocks.max_quota is None),
        ]

    def variant_due(
        self,
        block: Number,
        step_in_block: Number,
        cache_state: EarlySkipState | None,
        net: CanvasModel,
        blocks: Blocks,
    ) -> Number:
        kinds = self.kinds(blocks)
        place = block * blocks.length + step_in_block
        refresh = place % self.prompt_every == 0
        # The first that holds, from top to bottom.
        due = {"canvas": place == 0}
        due |= {n: refresh & (block < n) for n in kinds if isinstance(n, int)}
        due |= {"two_blocks": step_in_block == 0, "block": place % self.block_every == 0}
        if "skip_few" in kinds:
            revealed = jnp.max(jnp.sum(cache_state.revealed, axis=1))
            few = self.plan(net.cfg.num_layers, blocks).kept[-1]
            due["skip_few"] = jnp.minimum(revealed + 2, blocks.length) > few
        due = {kinds.index(name): holds for name, holds in due.items() if name in kinds}
        return jnp.select(list(due.values()), list(due), kinds.index("skip"))

    # --------------------------------------------------------------------------- the protocol

    def init_state(self, net: CanvasModel, blocks: Blocks) -> EarlySkipState:
        self.check(net, blocks)
        return EarlySkipVariants(self.plan(net.cfg.num_layers, blocks), net, blocks).init_state()

    def check(self, net: CanvasModel, blocks: Blocks) -> None:
        require(
            blocks.length % self.block_every == 0,
            f"block_every={self.block_every} must divide block_length={blocks.length}",
        )
        require(
            net.prompt_mask is None,
            "EarlySkip does not compose with guidance, whose halves would keep different tokens; "
            "set cfg_scale=0",
        )
        require(
            self.indicator == "hidden" or net.policy is None,
            f"indicator={self.indicator!r} reads a layer that a policy may skip; "
            "use indicator='hidden'",
        )

    def forward_variants(self, net: CanvasModel, blocks: Blocks) -> list[ForwardVariant]:
        forward_variants = EarlySkipVariants(self.plan(net.cfg.num_layers, blocks), net, blocks)
        make = {
            "canvas": forward_variants.canvas,
            "two_blocks": forward_variants.two_blocks,
            "block": forward_variants.block,
            "skip": forward_variants.skip,
            "skip_few": partial(forward_variants.skip, few=True),
        }
        kinds = self.kinds(blocks)
        return [make[kind]() if kind in make else forward_variants.up_to(kind) for kind in kinds]

    def after_reveal(
        self, cache_state: EarlySkipState, revealed: Revealed, net: CanvasModel
    ) -> EarlySkipState:
        slots = Slots(revealed.index - net.logit_shift, revealed.active)
        confidence = jnp.where(revealed.commit, 0.0, revealed.confidence)
        kept = jnp.where(revealed.unfinished[:, None], False, cache_state.revealed)
        return cache_state._replace(
            confidence=write(cache_state.confidence, confidence, slots, keep=revealed.unfinished),
            revealed=write(kept, revealed.commit, slots, keep=revealed.unfinished),
        )
