"""The Llama-shaped transformer of LLaDA, Dream and Qwen2; `ModelConfig` tells them apart."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from dials_jax import trees
from dials_jax.config import ModelConfig
from dials_jax.nn.block import Block, Embed, Head, Rows
from dials_jax.nn.fusing import is_fused
from dials_jax.nn.kv import Slots, write
from dials_jax.nn.norm import RMSNorm
from dials_jax.nn.pure import Pure
from dials_jax.nn.rope import positions_of, rope_angles
from dials_jax.nn.stack import (
    Denoising,
    Executor,
    Layer,
    Policy,
    StackOutput,
    run_stack,
)


class Parts(NamedTuple):
    """The pure functions that a model is put together from."""

    embed: Pure
    block: Pure
    fused_block: Pure  # the same with its products joined
    final_norm: Pure
    head: Pure


@lru_cache
def parts(cfg: ModelConfig) -> Parts:
    return Parts(
        embed=Pure(lambda rngs: Embed(cfg, rngs)),
        block=Pure(lambda rngs: Block(cfg, rngs)),
        fused_block=Pure(lambda rngs: Block(cfg, rngs, fused=True)),
        final_norm=Pure(lambda rngs: RMSNorm(cfg.d_model, cfg.norm_eps, rngs)),
        head=Pure(lambda rngs: Head(cfg, rngs)),
    )


def block_of(cfg: ModelConfig, layer: trees.Params) -> Pure:
    """The block that takes a layer's parameters as they are laid out."""
    return parts(cfg).fused_block if is_fused(layer) else parts(cfg).block


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


def rows_of(cfg: ModelConfig, valid: Bool[Array, "B T"] | None, shape: tuple[int, int]) -> Rows:
    """The rows of a whole canvas: positions count from each row's first real token."""
    present = jnp.ones(shape, bool) if valid is None else valid
    angles = rope_angles(positions_of(present), cfg.head_dim, cfg.rope_theta)
    index = jnp.broadcast_to(jnp.arange(shape[1]), shape)
    return Rows(angles, valid, Slots(index))


def layer_of(cfg: ModelConfig, *, contiguous: bool = False, remat: bool = False) -> Layer:
    """The model's block, whose memory is a `KV` of the canvas.

    Args:
      contiguous: the tokens of a call are one range, the same in every row.
      remat: recompute each block in the backward pass.
    """

    def block(params, h, rows, wanted=None):
        return block_of(cfg, params)(params, h, rows, wanted)

    def project(params, h, rows, wanted=None):
        return block_of(cfg, params)(params, h, rows, wanted, method="project")

    def mix(params, h, q, kv, rows, wanted=None):
        return block_of(cfg, params)(params, h, q, kv, rows, wanted, method="mix")

    def remember(kv, new, rows, keep):
        return write(kv, new, rows.slots, contiguous=contiguous, keep=keep)

    return Layer(jax.checkpoint(block) if remat else block, project, mix, remember)


def run_layers(
    cfg: ModelConfig,
    params: trees.Params,
    tokens: Int[Array, "B T"],
    valid: Bool[Array, "B T"] | None,
    policy: Policy | None = None,
    *,
    step: Int[Array, ""] | int = 0,
    row_keys: PyTree = None,
    vote_from: int = 0,
    executor: Executor = "auto",
    observe: Callable[[Array, Array], PyTree] | None = None,
    remat: bool = False,
) -> StackOutput:
    """From a whole sequence to the residual stream before the final norm.

    Args:
      valid: False at padding, which no token attends to. None means no padding, and is faster.
      vote_from: no token before this one is masked, so routers need not look there.
      remat: recompute each block in the backward pass.
    """
    masked = is_masked(cfg, tokens) if valid is None else is_masked(cfg, tokens) & valid
    return run_stack(
        layer_of(cfg, remat=remat),
        params["layers"],
        parts(cfg).embed(params["embed"], tokens),
        rows_of(cfg, valid, tokens.shape),
        policy,
        Denoising(masked, jnp.asarray(step), row_keys, vote_from),
        executor=executor,
        observe=observe,
    )


def is_masked(cfg: ModelConfig, tokens: Int[Array, "*B T"]) -> Bool[Array, "*B T"]:
    """Where a token is [MASK]; nowhere, in a model without one."""
    return jnp.zeros(tokens.shape, bool) if cfg.mask_id is None else tokens == cfg.mask_id


def logits_of(
    cfg: ModelConfig, params: trees.Params, h: Float[Array, "B T D"]
) -> Float[Array, "B T V"]:
    """Final norm and head of the rows given: float32 logits."""
    part = parts(cfg)
    return part.head(params["head"], part.final_norm(params["final_norm"], h))


def predicting(
    cfg: ModelConfig, h: Float[Array, "B T D"], valid: Bool[Array, "B T"] | None = None
) -> Float[Array, "B T D"]:
    """The stream moved so that row i predicts token i; as it is, unless `cfg.shift`.

    Moved before the head, whose logits are many times as wide. Nothing predicts a row's first
    token: there its own state stays, so that padding on the left changes no prediction.

    Args:
      valid: False at padding; None: no padding.
    """
    if not cfg.shift:
        return h
    left = jnp.concatenate([h[:, :1], h[:, :-1]], axis=1)
    if valid is None:
        return left
    return jnp.where(jnp.pad(valid, ((0, 0), (1, 0)))[:, :-1, None], left, h)


def predictions(
    cfg: ModelConfig,
    params: trees.Params,
    h: Float[Array, "B T D"],
    valid: Bool[Array, "B T"] | None = None,
) -> Float[Array, "B T V"]:
    """Float32 logits: row i predicts token i, or token i + 1 in a causal model."""
    return logits_of(cfg, params, predicting(cfg, h, valid))
