"""LLaDA: a bidirectional Llama-shaped transformer that predicts masked tokens.

Source: Nie et al. 2025, "Large Language Diffusion Models"; `modeling_llada.py` of the published
checkpoints for the numerics.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from dials_jax import trees
from dials_jax.config import ModelConfig
from dials_jax.nn.block import Block, Embed, Head
from dials_jax.nn.norm import RMSNorm
from dials_jax.nn.pure import Pure
from dials_jax.nn.rope import positions_of, rope_angles
from dials_jax.nn.stack import Denoising, Executor, Policy, StackOutput, run_stack


class Parts(NamedTuple):
    """The pure functions that a model is put together from."""

    embed: Pure
    block: Pure
    final_norm: Pure
    head: Pure


@lru_cache
def parts(cfg: ModelConfig) -> Parts:
    return Parts(
        embed=Pure(lambda rngs: Embed(cfg, rngs)),
        block=Pure(lambda rngs: Block(cfg, rngs)),
        final_norm=Pure(lambda rngs: RMSNorm(cfg.d_model, cfg.norm_eps, rngs)),
        head=Pure(lambda rngs: Head(cfg, rngs)),
    )


def init(cfg: ModelConfig, key: jax.Array) -> trees.Params:
    """Random float32 parameters, layers stacked."""
    embed_key, layers_key, head_key = jax.random.split(key, 3)
    part = parts(cfg)
    return {
        "embed": part.embed.init(embed_key),
        "layers": part.block.init_stack(layers_key, cfg.num_layers),
        "final_norm": part.final_norm.init(head_key),
        "head": part.head.init(head_key),
    }


def run_layers(
    cfg: ModelConfig,
    params: trees.Params,
    tokens: Int[Array, "B T"],
    valid: Bool[Array, "B T"] | None,
    policy: Policy | None = None,
    *,
    step: Int[Array, ""] | int = 0,
    row_keys: PyTree = None,
    executor: Executor = "auto",
    observe: Callable[[Array, Array], PyTree] | None = None,
    remat: bool = False,
) -> StackOutput:
    """From tokens to the residual stream before the final norm.

    Args:
      valid: False at padding, which no token attends to. None means no padding, and is faster.
      remat: recompute each block in the backward pass.
    """
    part = parts(cfg)
    present = jnp.ones(tokens.shape, bool) if valid is None else valid
    angles = rope_angles(positions_of(present), cfg.head_dim, cfg.rope_theta)

    def block(layer, h, rows):
        return part.block(layer, h, rows["angles"], rows["valid"])

    denoising = Denoising((tokens == cfg.mask_id) & present, jnp.asarray(step), row_keys)
    return run_stack(
        jax.checkpoint(block) if remat else block,
        params["layers"],
        part.embed(params["embed"], tokens),
        {"angles": angles, "valid": valid},
        policy,
        denoising,
        executor=executor,
        observe=observe,
    )


def logits_of(
    cfg: ModelConfig, params: trees.Params, h: Float[Array, "B T D"]
) -> Float[Array, "B T V"]:
    """Final norm and head: float32 logits, each row predicting its own position."""
    part = parts(cfg)
    return part.head(params["head"], part.final_norm(params["final_norm"], h))


# ----------------------------------------------------------------------------------- presets


def llada_8b(**changes) -> ModelConfig:
    """The published LLaDA-8B (Base and Instruct)."""
    values = dict(
        vocab_size=126464, d_model=4096, num_layers=32, num_heads=32, num_kv_heads=32,
        head_dim=128, d_ff=12288, max_length=4096, rope_theta=500000.0, norm_eps=1e-5,
        mask_id=126336, eos_id=126081, pad_id=126081, eot_id=126348,
    )  # fmt: skip
    return ModelConfig(**(values | changes))


def small(
    num_layers: int,
    d_model: int,
    vocab_size: int,
    mask_id: int,
    eos_id: int,
    pad_id: int,
    **changes,
) -> ModelConfig:
    """A LLaDA of any size with heads of 64 (32 below width 256) and a SwiGLU of 8/3 the width."""
    head_dim = changes.pop("head_dim", 64 if d_model >= 256 else 32)
    values = dict(
        vocab_size=vocab_size, d_model=d_model, num_layers=num_layers,
        num_heads=d_model // head_dim, num_kv_heads=d_model // head_dim, head_dim=head_dim,
        d_ff=-(-8 * d_model // 3 // 64) * 64, max_length=1024, rope_theta=10000.0, norm_eps=1e-5,
        mask_id=mask_id, eos_id=eos_id, pad_id=pad_id,
    )  # fmt: skip
    return ModelConfig(**(values | changes))
