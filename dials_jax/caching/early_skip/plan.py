"""What ES-dLLM's settings come to in one model: where tokens leave, and what is remembered."""

from __future__ import annotations

from typing import Literal, NamedTuple

from jaxtyping import Array, Bool, Float, PyTree

Indicator = Literal["hidden", "query", "key", "value"]


class SkipPlan(NamedTuple):
    """What `EarlySkip` comes to in one model and one block length."""

    alpha: float
    indicator: Indicator
    layers: tuple[int, ...]  # where tokens leave
    proportions: tuple[float, ...]  # of the window that runs from each depth on
    kept: tuple[int, ...]  # the same in tokens, as long as steps reveal few

    def spans(self, num_layers: int) -> list[tuple[int, int]]:
        """Ranges of layers that run on equally many tokens.

        Tokens leave on the output of a layer, at the end of a span. Where its queries, keys or
        values decide, they leave within the layer, which is then a span by itself.
        """
        if self.indicator == "hidden":
            cuts = [layer + 1 for layer in self.layers]
        else:
            cuts = [cut for layer in self.layers for cut in (layer, layer + 1)]
        return list(zip([0, *cuts], [*cuts, num_layers], strict=True))

    def depth(self, layer: int) -> int:
        """The number of places before `layer` where tokens have left."""
        inside = self.indicator != "hidden"
        return sum(layer >= at if inside else layer > at for at in self.layers)


class EarlySkipState(NamedTuple):
    """What ES-dLLM keeps of the canvas's places S."""

    kv: tuple[PyTree, ...]  # one a span of layers
    seen: tuple[Array, ...]  # [R, S, ...] hidden states or queries, one a layer where tokens leave
    confidence: Float[Array, "R S"]  # of the token last proposed; 0 where none can be revealed
    revealed: Bool[Array, "R S"]  # by the last step
