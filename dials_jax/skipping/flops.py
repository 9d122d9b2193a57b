"""The cost of a run, as three numbers.

`layers_run` is the papers' figure: layers run over layers. `flops_share` counts the whole model:
the head, attention by length and what the policy computes. `seconds` is measured. Of a generation,
each sequence's own calls count; `seconds` is that of all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from dials_jax.config import ModelConfig
from dials_jax.nn.modulation import IN_BLOCK
from dials_jax.nn.policy import Policy, policy_flops

# The key of each field in stored results, of this version and of earlier ones.
KEYS = {
    "layers_run": "layers_run",
    "flops_share": "model",
    "model_total": "model_total",
    "seconds": "seconds",
}


class Flops(NamedTuple):
    """Cost of a run; the shares are of the same run with every layer executed."""

    layers_run: float  # share of layers run
    flops_share: float  # share of the whole model's FLOPs, the policy's own included
    model_total: float  # FLOPs
    seconds: float  # measured, without compilation

    @property
    def model(self) -> float:
        """`flops_share` by its earlier name."""
        return self.flops_share

    def to_dict(self) -> dict[str, float]:
        """For results on disk."""
        return {key: getattr(self, name) for name, key in KEYS.items()}

    @classmethod
    def from_dict(cls, stored: Mapping[str, float]) -> Flops:
        return cls(**{name: stored[key] for name, key in KEYS.items()})

    @classmethod
    def sum(cls, parts: list[Flops]) -> Flops:
        """Totals of several runs; shares weighted by the FLOPs they are shares of.

        Sums are exact before they are rounded, so the order of the runs does not matter.
        """
        full = [p.model_total / p.flops_share for p in parts]
        layers = [p.layers_run * f for p, f in zip(parts, full, strict=True)]
        total = math.fsum(p.model_total for p in parts)
        return cls(
            layers_run=math.fsum(layers) / math.fsum(full),
            flops_share=total / math.fsum(full),
            model_total=total,
            seconds=math.fsum(p.seconds for p in parts),
        )


def layer_flops(
    cfg: ModelConfig, num_tokens: Any, num_keys: Any = None, num_projected: Any = None
) -> Any:
    """One layer on one sequence: projections, and attention of every token to every key.

    If the time modulates a layer, the map from c counts too; for a constant it does not.

    Args:
      num_keys: None: the tokens themselves.
      num_projected: tokens that get queries, keys and values; None: those on which the rest runs.
    """
    num_keys = num_tokens if num_keys is None else num_keys
    num_projected = num_tokens if num_projected is None else num_projected
    heads = cfg.num_heads * cfg.head_dim
    to_heads = cfg.d_model * (heads + 2 * cfg.num_kv_heads * cfg.head_dim)
    mlp = {"swiglu": 3, "gelu": 2}[cfg.mlp] * cfg.d_ff
    after = 2 * num_keys * heads + cfg.d_model * (heads + mlp)
    modulation = cfg.time_conditioning * cfg.cond_dim * IN_BLOCK * cfg.d_model
    return 2 * (num_projected * to_heads + num_tokens * after + modulation)


def head_flops(cfg: ModelConfig, num_tokens: Any) -> Any:
    return 2 * num_tokens * cfg.d_model * cfg.vocab_size


def router_flops(cfg: ModelConfig, num_tokens: Any, d_hidden: int, depth: int = 2) -> Any:
    """One router of hidden width `d_hidden` and `depth` linear layers on one sequence."""
    return 2 * num_tokens * d_hidden * (cfg.d_model + (depth - 2) * d_hidden + 2)


def call_flops(
    cfg: ModelConfig,
    gates: Bool[np.ndarray, "S L B"],
    num_keys: int | Int[np.ndarray, "S"],
    head_tokens: int | Int[np.ndarray, "S"],
    tokens_run: Int[np.ndarray, "S L"],
    projected: Int[np.ndarray, "S L"] | None = None,
    voting: Int[np.ndarray, "S L"] | None = None,
    policy: Policy | None = None,
) -> Float[np.ndarray, "S B"]:
    """FLOPs of each model call on each sequence.

    Args:
      num_keys: keys that a token attends to, in each call.
      head_tokens: positions per sequence whose logits were computed, in each call.
      tokens_run: tokens per sequence on which a layer ran.
      projected: those that got queries, keys and values there; None: those it ran on.
      voting: those that the policy looked at before a layer; None: those it ran on.
      policy: the cost of its decisions is counted.
    """
    run, keys = tokens_run.astype(float), np.broadcast_to(num_keys, len(gates))[:, None]
    layers = layer_flops(cfg, run, keys, projected)
    decisions = policy_flops(policy, cfg, run if voting is None else voting.astype(float))
    rest = decisions.sum(axis=1) + head_flops(cfg, np.broadcast_to(head_tokens, len(gates)))
    return np.einsum("slb,sl->sb", gates, layers) + rest[:, None]


def count_flops(
    cfg: ModelConfig,
    gates: Bool[np.ndarray, "*S L B"],
    num_tokens: int,
    head_tokens: int | Int[np.ndarray, "S"],
    tokens_run: Int[np.ndarray, "S L"] | None = None,
    voting: Int[np.ndarray, "S L"] | None = None,
    policy: Policy | None = None,
    seconds: float = 0.0,
) -> Flops:
    """The cost of model calls whose gates were `gates`.

    Args:
      num_tokens: length of a sequence, with padding, since the device computes it.
      head_tokens: positions per sequence whose logits were computed, or those of each call.
      tokens_run, voting, policy: as of `call_flops`; None: all tokens.
    """
    num_calls, num_layers, batch = np.prod(gates.shape[:-2], dtype=int), *gates.shape[-2:]
    gates = gates.reshape(num_calls, num_layers, batch)
    run = np.full(gates.shape[:2], num_tokens) if tokens_run is None else tokens_run
    total = call_flops(cfg, gates, num_tokens, head_tokens, run, None, voting, policy).sum()
    most = head_flops(cfg, np.max(head_tokens, initial=0))
    # As a float: the whole may be more than 64 bits hold.
    full = float(num_calls) * batch * (num_layers * layer_flops(cfg, num_tokens) + most)
    return Flops(float(gates.mean()), float(total / full), float(total), seconds)
