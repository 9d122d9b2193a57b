"""ES-dLLM: early layers skip the unimportant tokens, over a cache of everything.

Most steps run only the block and skip tokens: after some layers only those are kept that are
confident or have changed since they were last cached. From time to time a step runs the whole
block, or the canvas up to the block's end, to refresh the cache.

Source: ES-dLLM, and its published code for the constants and the schedule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import jax.numpy as jnp
import numpy as np

from dials_jax.caching.cache import Blocks, ForwardVariant, Revealed
from dials_jax.caching.canvas import CanvasModel
from dials_jax.caching.early_skip.importance import num_kept
from dials_jax.caching.early_skip.layers import EarlySkipState, Indicator, SkipPlan, empty_state
from dials_jax.caching.early_skip.variants import EarlySkipVariants
from dials_jax.config import Typed, require_positive
from dials_jax.errors import require
from dials_jax.nn.kv import Slots, write_slots


@dataclass(frozen=True)
class EarlySkip(Typed):
    """Settings of ES-dLLM.

    Attributes:
      proportions: share of the block that runs from each depth on; the first is 1.
      depths: as shares of the layers. Tokens are skipped after layer ceil(depth * L).
      alpha: weight of confidence against change in a token's importance.
      prompt_every: every this many tokens the canvas up to the block's end is refreshed.
      block_every: every this many tokens the whole block is refreshed; divides the block's length.
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

    # --------------------------------------------------------------------------- the protocol

    def init_state(self, net: CanvasModel, blocks: Blocks) -> EarlySkipState:
        self.check(net, blocks)
        return empty_state(self.resolve(net.cfg.num_layers, blocks), net)

    def forward_variants(self, net: CanvasModel, blocks: Blocks) -> list[ForwardVariant]:
        self.check(net, blocks)
        plan = self.resolve(net.cfg.num_layers, blocks)
        return EarlySkipVariants(plan, net, blocks).needed(self.prompt_every, self.block_every)

    def after_reveal(
        self, cache_state: EarlySkipState, revealed: Revealed, net: CanvasModel
    ) -> EarlySkipState:
        slots = Slots(revealed.index - net.logit_shift, revealed.active)
        confidence = jnp.where(revealed.commit, 0.0, revealed.confidence)
        kept = jnp.where(revealed.unfinished[:, None], False, cache_state.revealed)
        return cache_state._replace(
            confidence=write_slots(
                cache_state.confidence, confidence, slots, keep=revealed.unfinished
            ),
            revealed=write_slots(kept, revealed.commit, slots, keep=revealed.unfinished),
        )

    # ----------------------------------------------------------------- in one model, for one block

    def check(self, net: CanvasModel, blocks: Blocks) -> None:
        """Raises: InputError for arguments that these settings do not compose with."""
        require(
            blocks.length % self.block_every == 0,
            f"block_every={self.block_every} must divide block_length={blocks.length}; "
            "change one of them",
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

    def resolve(self, num_layers: int, blocks: Blocks) -> SkipPlan:
        """The plan of these settings in a model of `num_layers` layers."""
        quota = np.int64(blocks.max_quota or 1)
        kept = tuple(int(num_kept(p, blocks.length, quota)) for p in self.proportions)
        layers = tuple(self.skip_layers(num_layers))
        return SkipPlan(self.alpha, self.indicator, layers, self.proportions, kept)

    def skip_layers(self, num_layers: int) -> list[int]:
        """The layers where tokens are skipped: ceil(depth * L), without depth 0."""
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
