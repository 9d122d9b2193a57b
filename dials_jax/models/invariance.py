"""Where the batch-invariant mode holds: see `nn.kernels.implementation`."""

from __future__ import annotations

import jax
from jax.sharding import Mesh

from dials_jax.config import ModelConfig
from dials_jax.errors import require
from dials_jax.nn.kernels.hopper_attention import HEAD_DIM
from dials_jax.nn.kernels.per_device import on_hopper


def require_invariant(cfg: ModelConfig, mesh: Mesh) -> None:
    """Raises: InputError where a sequence's result may depend on its batch in the mode, too."""
    why = _refusal(cfg, mesh)
    require(why is None, f"batch_invariant=True {why}; leave it out, and compare at one batch size")


def _refusal(cfg: ModelConfig, mesh: Mesh) -> str | None:
    if mesh.shape["tensor"] > 1:
        return "needs whole weights on every device, and mesh.tensor splits them"
    if cfg.block_length is not None:
        return "holds for no block-causal model, whose blocks begin where a prompt does"
    if jax.default_backend() == "cpu":
        return None
    if not on_hopper():
        return "needs a CPU, or Hopper GPUs (H100, H200) and JAX 0.11"
    if cfg.dtype != "bfloat16":
        return f"has no kernels for {cfg.dtype} on GPUs; bfloat16 has"
    if cfg.head_dim != HEAD_DIM or cfg.causal:
        return f"has kernels for bidirectional attention with heads of {HEAD_DIM} only on GPUs"
    return None
