"""The cost of a generation, under any schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from dials_jax.caching.cache import Work
from dials_jax.config import ModelConfig
from dials_jax.nn.policy import Policy
from dials_jax.skipping.flops import Flops, count_flops


@dataclass(frozen=True)
class Part:
    """A model and what each variant of its calls computes per sequence."""

    cfg: ModelConfig
    policy: Policy | None
    work: Sequence[Work]

    def tokens(self, variant: Int[np.ndarray, "S"]) -> Int[np.ndarray, "S L"]:
        return np.array([w.tokens for w in self.work])[variant]

    def cost(
        self, gates: Bool[np.ndarray, "S L R"], variant: Int[np.ndarray, "S"], num_tokens: int
    ) -> Flops:
        tokens = self.tokens(variant)
        return count_flops(
            self.cfg,
            gates,
            num_tokens=num_tokens,
            head_tokens=np.array([w.head for w in self.work])[variant],
            tokens_run=tokens,
            voting=tokens - np.array([[w.prompt] for w in self.work])[variant],
            policy=self.policy,
        )

    def full_cost(self, num_calls: int, num_sequences: int, num_tokens: int, head: int) -> float:
        """FLOPs of this many calls that run all layers on the whole canvas."""
        gates = np.ones((1, self.cfg.num_layers, 1), bool)
        one = count_flops(self.cfg, gates, num_tokens=num_tokens, head_tokens=head)
        return num_calls * num_sequences * one.model_total


def total_cost(
    parts: Sequence[Part],
    taken: Int[np.ndarray, "S"],
    gates: Bool[np.ndarray, "S L R"],
    variant: Int[np.ndarray, "S"],
    num_tokens: int,
    seconds: float,
) -> Flops:
    """The three numbers; shares are relative to the largest model making equally many full calls.

    Under a schedule without other skipping, 1 - `layers_run` is the saving p (B_H - B_L) / B_H,
    where the light model makes a share p of the calls: Sedykh (3).

    Args:
      taken: the number of the part that made each call.
    """
    num_sequences = gates.shape[-1]
    costs, layers_run = [], 0
    for i, part in enumerate(parts):
        mine = taken == i
        if mine.any():
            own = gates[mine, : part.cfg.num_layers]
            costs.append(part.cost(own, variant[mine], num_tokens).model_total)
            layers_run += int(own.sum())
    whole, head = _largest(parts, taken, variant, num_tokens)
    full = whole.full_cost(len(taken), num_sequences, num_tokens, head)
    layers = layers_run / (len(taken) * num_sequences * whole.cfg.num_layers)
    return Flops(layers, sum(costs) / full, float(sum(costs)), seconds)


def call_costs(
    parts: Sequence[Part],
    taken: Int[np.ndarray, "S"],
    gates: Bool[np.ndarray, "S L R"],
    variant: Int[np.ndarray, "S"],
    num_tokens: int,
    num_sequences: int,
) -> tuple[Float[np.ndarray, "S {num_sequences}"], float]:
    """FLOPs of each call on each sequence, of both halves under guidance, and those of a full call.

    Their sums over all calls and sequences are the `total_cost`, and what it is a share of.
    """
    found = np.zeros((len(taken), gates.shape[-1]))
    for call, number in enumerate(taken):
        part, one = parts[number], slice(call, call + 1)
        own = gates[one, : part.cfg.num_layers]
        for row in range(gates.shape[-1]):
            cost = part.cost(own[..., row : row + 1], variant[one], num_tokens)
            found[call, row] = cost.model_total
    copies = gates.shape[-1] // num_sequences
    whole, head = _largest(parts, taken, variant, num_tokens)
    full = whole.full_cost(1, copies, num_tokens, head)
    return found.reshape(len(taken), copies, num_sequences).sum(axis=1), full


def _largest(
    parts: Sequence[Part],
    taken: Int[np.ndarray, "S"],
    variant: Int[np.ndarray, "S"],
    num_tokens: int,
) -> tuple[Part, int]:
    """The model whose full call costs most, and the most tokens whose logits a call computed."""
    head = max(w.head for i, part in enumerate(parts) for w in _used(part, variant[taken == i]))
    return max(parts, key=lambda part: part.full_cost(1, 1, num_tokens, head)), head


def _used(part: Part, variant: Int[np.ndarray, "S"]) -> list[Work]:
    return [part.work[k] for k in np.unique(variant)]
