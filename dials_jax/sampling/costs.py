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


@dataclass(frozen=True)
class Calls:
    """Model calls of a batch, for their cost.

    A sequence's own calls count. So `layers_run` is what a sequence has alone; FLOPs are those of
    the batch's length and of the calls that its cache made.

    Attributes:
      parts: the models that make calls.
      taken: the number of the part that made each call.
      own: False where a sequence was finished and the call was made for others.
      variant: of each call, a number in `Part.work`.
      num_tokens: length of the canvas, with padding.
    """

    parts: Sequence[Part]
    taken: Int[np.ndarray, "S"]
    gates: Bool[np.ndarray, "S L R"]
    own: Bool[np.ndarray, "S R"]
    variant: Int[np.ndarray, "S"]
    num_tokens: int

    def flops(self) -> Float[np.ndarray, "S R"]:
        """Of each call on each sequence."""
        found = np.zeros(self.own.shape)
        for i, part in enumerate(self.parts):
            mine = self.taken == i
            if mine.any():
                layers = self.gates[mine, : part.cfg.num_layers]
                found[mine] = part.flops(layers, self.variant[mine], self.num_tokens)
        return np.where(self.own, found, 0.0)

    def total(self, seconds: float) -> Flops:
        """The three numbers; shares are relative to the largest model making as many full calls.

        Under a schedule without other skipping, 1 - `layers_run` is the saving p (B_H - B_L) / B_H,
        where the light model makes a share p of the calls: Sedykh (3).
        """
        total, count, (whole, full) = self.flops().sum(), self.own.sum(), self._largest()
        layers = (self.gates & self.own[:, None]).sum() / (count * whole.cfg.num_layers)
        return Flops(float(layers), float(total / (count * full)), float(total), seconds)

    def by_sequence(self, num_sequences: int) -> tuple[Float[np.ndarray, "S B"], float]:
        """FLOPs of each call on each sequence, of both halves under guidance, and of a full call.

        Their sums over all calls and sequences are the `total`, and what it is a share of.
        """
        copies = self.own.shape[1] // num_sequences
        found = self.flops().reshape(len(self.taken), copies, num_sequences)
        return found.sum(axis=1), copies * self._largest()[1]

    def _largest(self) -> tuple[Part, float]:
        """The model whose full call costs most, and the FLOPs of that on one sequence.

        A full call computes as many logits as the call that computed most.
        """
        pairs = {(int(i), int(k)) for i, k in zip(self.taken, self.variant, strict=True)}
        head = max(self.parts[i].work[k].head for i, k in pairs)
        full = [part.full_flops(self.num_tokens, head) for part in self.parts]
        return self.parts[np.argmax(full)], max(full)
