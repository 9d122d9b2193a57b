"""What a run cost, as three numbers.

`layers_run` is the papers' figure: layers run over layers. `model` counts the whole model: the
head, attention by length and the routers. `seconds` is measured, compilation apart.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from dials_jax.config import ModelConfig
from dials_jax.nn.modulation import IN_BLOCK


class Flops(NamedTuple):
    """Cost of a run; the shares are of the same run with every layer executed."""

    layers_run: float  # share of layers run
    model: float  # share of the whole model's FLOPs, routers included
    model_total: float  # FLOPs
    seconds: float  # measured, compilation apart

    @classmethod
    def sum(cls, parts: list[Flops]) -> Flops:
        """Totals of several runs; shares weighted by the FLOPs they are shares of.

        Sums are exact before they are rounded, so the order of the runs does not matter.
        """
        full = [p.model_total / p.model for p in parts]
        layers = [p.layers_run * f for p, f in zip(parts, full, strict=True)]
        total = math.fsum(p.model_total for p in parts)
        return cls(
            layers_run=math.fsum(layers) / math.fsum(full),
            model=total / math.fsum(full),
            model_total=total,
            seconds=math.fsum(p.seconds for p in parts),
        )


def layer_flops(cfg: ModelConfig, num_tokens: Any, num_keys: Any = None) -> Any:
    """One layer on one row: projections, and attention of every token to every key.

    Where the time modulates a layer, it also pays for the map from c; a constant is free.

    Args:
      num_keys: None: the tokens themselves.
    """
    num_keys = num_tokens if num_keys is None else num_keys
    heads = (2 * cfg.num_heads + 2 * cfg.num_kv_heads) * cfg.head_dim
    mlp = {"swiglu": 3, "gelu": 2}[cfg.mlp] * cfg.d_ff
    projections = cfg.d_model * (heads + mlp)
    attention = 2 * num_keys * cfg.num_heads * cfg.head_dim
    modulation = cfg.time_conditioning * cfg.cond_dim * IN_BLOCK * cfg.d_model
    return 2 * (num_tokens * (projections + attention) + modulation)


def head_flops(cfg: ModelConfig, num_tokens: Any) -> Any:
    return 2 * num_tokens * cfg.d_model * cfg.vocab_size


def router_flops(cfg: ModelConfig, num_tokens: Any, d_hidden: int) -> Any:
    """One router on one row; 0 for `d_hidden` 0."""
    return 2 * num_tokens * d_hidden * (cfg.d_model + 2)


def count_flops(
    cfg: ModelConfig,
    gates: Bool[np.ndarray, "*S L B"],
    num_tokens: int,
    head_tokens: int | Int[np.ndarray, "S"],
    tokens_run: Int[np.ndarray, "S L"] | None = None,
    voting: Int[np.ndarray, "S L"] | None = None,
    d_router: int = 0,
    seconds: float = 0.0,
) -> Flops:
    """The cost of model calls whose gates were `gates`.

    Args:
      num_tokens: length of a row, padding included, for that is what the device computes.
      head_tokens: positions a row whose logits were computed, or those of each call.
      tokens_run: tokens a row on which a layer ran; None: all.
      voting: tokens a row that a layer's router ran on; None: those the layer ran on.
      d_router: hidden width of the routers; 0 without routers.
    """
    num_calls, num_layers, num_rows = np.prod(gates.shape[:-2], dtype=int), *gates.shape[-2:]
    gates = gates.reshape(num_calls, num_layers, num_rows)
    run = np.full(gates.shape[:2], num_tokens) if tokens_run is None else tokens_run
    voting = run if voting is None else voting
    head = np.broadcast_to(head_tokens, num_calls)
    layers = (gates.sum(axis=-1) * layer_flops(cfg, run.astype(float), num_tokens)).sum()
    rest = router_flops(cfg, voting.astype(float), d_router).sum() + head_flops(cfg, head).sum()
    total = float(layers + num_rows * rest)
    most = head_flops(cfg, head.max(initial=0))
    full = num_calls * num_rows * (num_layers * layer_flops(cfg, num_tokens) + most)
    return Flops(float(gates.mean()), float(total / full), total, seconds)
