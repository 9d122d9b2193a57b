"""The cost of a generation, under any schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from dials_jax.caching.cache import Work
from dials_jax.config import ModelConfig
from dials_jax.nn.policy import Policy
from dials_jax.skipping.flops import Flops, call_flops, head_flops, layer_flops


@dataclass(frozen=True)
class Part:
    """A model and what each variant of its calls computes per sequence."""

    cfg: ModelConfig
    policy: Policy | None
    work: Sequence[Work]

    def tokens(self, variant: Int[np.ndarray, "S"]) -> Int[np.ndarray, "S L"]:
        return np.array([w.tokens for w in self.work])[variant]

    def flops(
        self, gates: Bool[np.ndarray, "S L R"], variant: Int[np.ndarray, "S"], num_tokens: int
    ) -> Float[np.ndarray, "S R"]:
        """Of each call on each sequence."""

        def of_calls(values: list) -> np.ndarray:
            return np.array(values)[variant]

        tokens = self.tokens(variant)
        return call_flops(
            self.cfg,
            gates,
            num_keys=of_calls([w.keys or num_tokens for w in self.work]),
            head_tokens=of_calls([w.head for w in self.work]),
            tokens_run=tokens,
            projected=of_calls([w.projected or w.tokens for w in self.work]),
            voting=tokens - of_calls([[w.prompt] for w in self.work]),
            policy=self.policy,
        )

    def full_flops(self, num_tokens: int, head: int) -> float:
        """Of a call that runs all layers on the whole canvas of one sequence."""
        layers = self.cfg.num_layers * layer_flops(self.cfg, num_tokens)
        return float(layers + head_flops(self.cfg, head))


def total_cost(
    parts: Sequence[Part],
    taken: Int[np.ndarray, "S"],
    gates: Bool[np.ndarray, "S L R"],
    own: Bool[np.ndarray, "S R"],
    variant: Int[np.ndarray, "S"],
    num_tokens: int,
    seconds: float,
) -> Flops:
    """The three numbers; shares are relative to the largest model making equally many full calls.

    A sequence's own calls count, so that the numbers are what it has alone.

    Under a schedule without other skipping, 1 - `layers_run` is the saving p (B_H - B_L) / B_H,
    where the light model makes a share p of the calls: Sedykh (3).

    Args:
      taken: the number of the part that made each call.
      own: False where a sequence was finished and the call was made for others.
    """
    total = _flops(parts, taken, gates, own, variant, num_tokens).sum()
    whole, head = _largest(parts, taken, variant, num_tokens)
    calls = own.sum()
    layers = (gates & own[:, None]).sum() / (calls * whole.cfg.num_layers)
    share = total / (calls * whole.full_flops(num_tokens, head))
    return Flops(float(layers), float(share), float(total), seconds)


def call_costs(
    parts: Sequence[Part],
    taken: Int[np.ndarray, "S"],
    gates: Bool[np.ndarray, "S L R"],
    own: Bool[np.ndarray, "S R"],
    variant: Int[np.ndarray, "S"],
    num_tokens: int,
    num_sequences: int,
) -> tuple[Float[np.ndarray, "S {num_sequences}"], float]:
    """FLOPs of each call on each sequence, of both halves under guidance, and those of a full call.

    Their sums over all calls and sequences are the `total_cost`, and what it is a share of.
    """
    found = _flops(parts, taken, gates, own, variant, num_tokens)
    copies = gates.shape[-1] // num_sequences
    whole, head = _largest(parts, taken, variant, num_tokens)
    full = copies * whole.full_flops(num_tokens, head)
    return found.reshape(len(taken), copies, num_sequences).sum(axis=1), full


def _flops(
    parts: Sequence[Part],
    taken: Int[np.ndarray, "S"],
    gates: Bool[np.ndarray, "S L R"],
    own: Bool[np.ndarray, "S R"],
    variant: Int[np.ndarray, "S"],
    num_tokens: int,
) -> Float[np.ndarray, "S R"]:
    found = np.zeros(own.shape)
    for i, part in enumerate(parts):
        mine = taken == i
        if mine.any():
            layers = gates[mine, : part.cfg.num_layers]
            found[mine] = part.flops(layers, variant[mine], num_tokens)
    return np.where(own, found, 0.0)


def _largest(
    parts: Sequence[Part],
    taken: Int[np.ndarray, "S"],
    variant: Int[np.ndarray, "S"],
    num_tokens: int,
) -> tuple[Part, int]:
    """The model whose full call costs most, and the most tokens whose logits a call computed."""
    head = max(w.head for i, part in enumerate(parts) for w in _used(part, variant[taken == i]))
    return max(parts, key=lambda part: part.full_flops(num_tokens, head)), head


def _used(part: Part, variant: Int[np.ndarray, "S"]) -> list[Work]:
    return [part.work[k] for k in np.unique(variant)]
