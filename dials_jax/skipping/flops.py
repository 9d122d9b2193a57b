"""What a run cost, as three numbers.

`layers_run` is the papers' figure: layers run over layers. `model` counts the whole model: the
head, attention by length and the routers. `seconds` is measured, compilation apart.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

from dials_jax.config import ModelConfig


class Flops(NamedTuple):
    """Cost of a run; the shares are of the same run with every layer executed."""

    layers_run: float  # share of layers run
    model: float  # share of the whole model's FLOPs, routers included
    model_total: float  # FLOPs
    seconds: float  # measured, compilation apart

    @classmethod
    def sum(cls, parts: list[Flops]) -> Flops:
        """Totals of several runs; shares weighted by the FLOPs they are shares of."""
        full = np.array([p.model_total / p.model for p in parts])
        layers = np.array([p.layers_run for p in parts])
        total = float(sum(p.model_total for p in parts))
        return cls(
            layers_run=float((layers * full).sum() / full.sum()),
            model=total / float(full.sum()),
            model_total=total,
            seconds=float(sum(p.seconds for p in parts)),
        )


def layer_flops(cfg: ModelConfig, num_tokens: int) -> int:
    """One layer on one row: projections, and attention of every token to every token."""
    heads = (2 * cfg.num_heads + 2 * cfg.num_kv_heads) * cfg.head_dim
    projections = cfg.d_model * heads + 3 * cfg.d_model * cfg.d_ff
    attention = 2 * num_tokens * cfg.num_heads * cfg.head_dim
    return 2 * num_tokens * (projections + attention)


def head_flops(cfg: ModelConfig, num_tokens: int) -> int:
    return 2 * num_tokens * cfg.d_model * cfg.vocab_size


def router_flops(cfg: ModelConfig, num_tokens: int, d_hidden: int) -> int:
    """One router on one row; 0 for `d_hidden` 0. A fixed shape runs it on every token."""
    return 2 * num_tokens * d_hidden * (cfg.d_model + 2)


def count_flops(
    cfg: ModelConfig,
    gates: Bool[np.ndarray, "*S L B"],
    num_tokens: int,
    head_tokens: int,
    d_router: int = 0,
    seconds: float = 0.0,
) -> Flops:
    """The cost of model calls whose gates were `gates`.

    Args:
      num_tokens: length of a row, padding included, for that is what the device computes.
      head_tokens: positions a row whose logits were computed.
      d_router: hidden width of the routers; 0 without routers.
    """
    calls = gates.size / cfg.num_layers  # rows times model calls
    layer, head = layer_flops(cfg, num_tokens), head_flops(cfg, head_tokens)
    router = cfg.num_layers * router_flops(cfg, num_tokens, d_router)
    full = calls * (cfg.num_layers * layer + head)
    total = float(gates.sum()) * layer + calls * (head + router)
    return Flops(float(gates.mean()), total / full, total, seconds)
