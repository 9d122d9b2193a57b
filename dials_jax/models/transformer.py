"""The transformer of every family; `ModelConfig` tells them apart."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from dials_jax import trees
from dials_jax.config import ModelConfig
from dials_jax.keys import threefry_key
from dials_jax.nn.block import VOCABULARY_UNIT, Block, BlockInputs, Embed, Head, pad_vocabulary
from dials_jax.nn.dropout import Dropout, numbered
from dials_jax.nn.fusing import is_fused
from dials_jax.nn.kv import Slots, gather, write
from dials_jax.nn.mask import Mask
from dials_jax.nn.modulation import AdaptiveNorm, TimeEmbed, is_folded, precompute_modulation
from dials_jax.nn.norm import make_norm
from dials_jax.nn.policy import Denoising, Policy
from dials_jax.nn.pure import Pure
from dials_jax.nn.rope import positions_of, rope_angles
from dials_jax.nn.stack import Executor, Layer, StackOutput, run_stack

NOISE_EPS = 1e-3  # of the linear schedule, whose noise is finite at t = 1


class Parts(NamedTuple):
    """The pure functions that a model is put together from, a group of parameters each."""

    embed: Pure
    block: Pure
    final_norm: Pure
    head: Pure
    time: Pure | None  # of a model with adaLN


@lru_cache
def parts(cfg: ModelConfig, *, fused: bool = False, ready: bool = False) -> Parts:
    """See `nn.fusing` for what is fused, and `ready` below."""

    def final_norm(rngs):
        return AdaptiveNorm(cfg, ready) if cfg.cond_dim else make_norm(cfg, rngs)

    return Parts(
        embed=Pure(lambda rngs: Embed(cfg, rngs)),
        block=Pure(lambda rngs: Block(cfg, rngs, fused, folded=ready)),
        final_norm=Pure(final_norm),
        head=Pure(lambda rngs: Head(cfg, rngs, padded=ready)),
        time=Pure(lambda rngs: TimeEmbed(cfg, rngs)) if cfg.cond_dim else None,
    )


def block_of(cfg: ModelConfig, layer: trees.Params) -> Pure:
    """The block that takes a layer's parameters as they are laid out."""
    return parts(cfg, fused=is_fused(layer), ready=is_folded(layer)).block


def init(cfg: ModelConfig, key: jax.Array) -> trees.Params:
    """Random float32 parameters, layers stacked."""
    key = threefry_key(key)
    embed_key, layers_key, head_key = jax.random.split(key, 3)
    part = parts(cfg)
    params = {
        "embed": part.embed.init(embed_key),
        "layers": part.block.init_stack(layers_key, cfg.num_layers),
        "final_norm": part.final_norm.init(head_key),
        "head": part.head.init(head_key),
    }
    return params | ({"time": part.time.init(jax.random.fold_in(key, 3))} if part.time else {})


# ------------------------------------------------------------------- what no call changes


def prepare_for_inference(cfg: ModelConfig, params: trees.Params) -> trees.Params:
    """The parameters for inference, with what is the same in every call worked out beforehand.

    The constants of adaLN are there, and the head's kernel is there once more with its vocabulary
    padded. Every function here takes the parameters either way, with equal results.
    """
    head = params["head"]
    if "padded" not in head and head["kernel"].shape[1] % VOCABULARY_UNIT:
        head = {**head, "padded": pad_vocabulary(head["kernel"])}
    return {**_fold_layers(cfg, _fold_final(cfg, params)), "head": head}


def _fold_layers(cfg: ModelConfig, params: trees.Params) -> trees.Params:
    layers = params["layers"]
    unrolled = trees.is_unrolled(layers)
    if not cfg.cond_dim or is_folded(layers[0] if unrolled else layers):
        return params
    c = _constant(cfg, params)
    layers = (
        tuple(precompute_modulation(cfg, x, c) for x in layers)
        if unrolled
        else precompute_modulation(cfg, layers, c)
    )
    return {**params, "layers": layers}


def _fold_final(cfg: ModelConfig, params: trees.Params) -> trees.Params:
    if not cfg.cond_dim or is_folded(params["final_norm"]):
        return params
    c = _constant(cfg, params)
    return {**params, "final_norm": precompute_modulation(cfg, params["final_norm"], c)}


def _constant(cfg: ModelConfig, params: trees.Params) -> Float[Array, "C"]:
    return parts(cfg).time(params["time"], jnp.zeros(1))[0]


def conditioning(
    cfg: ModelConfig, params: trees.Params, time: Float[Array, "B"] | None
) -> Float[Array, "B C"] | None:
    """What modulates the layers at the denoising time t; None where it is the folded constant.

    The time enters as sigma = -log(1 - (1 - 1e-3) t), the total noise of the linear schedule.
    """
    if time is None or not cfg.time_conditioning:
        return None
    sigma = -jnp.log1p(-(1 - NOISE_EPS) * time.astype(jnp.float32))
    return parts(cfg).time(params["time"], sigma)


# ----------------------------------------------------------------------------------- layers


def block_inputs(
    cfg: ModelConfig, valid: Bool[Array, "B T"] | None, shape: tuple[int, int]
) -> BlockInputs:
    """The rows of a whole canvas: positions count from each row's first real token."""
    index, mask = jnp.broadcast_to(jnp.arange(shape[1]), shape), Mask(valid, cfg.causal)
    if cfg.rope_theta is None:
        return BlockInputs(None, mask, Slots(index))
    positions = index if valid is None else positions_of(valid)
    return BlockInputs(rope_angles(positions, cfg.head_dim, cfg.rope_theta), mask, Slots(index))


def embed(
    cfg: ModelConfig, params: trees.Params, tokens: Int[Array, "B T"], rows: BlockInputs
) -> Float[Array, "B T D"]:
    """The residual stream before the first layer."""
    positions = None
    if cfg.rope_theta is None:
        index = rows.slots.index
        valid = rows.mask.valid
        positions = index if valid is None else gather(positions_of(valid), index)
    return parts(cfg).embed(params["embed"], tokens, positions)


def layer_of(
    cfg: ModelConfig,
    *,
    contiguous: bool = False,
    remat: bool = False,
    dropout: Dropout | None = None,
) -> Layer:
    """The model's block, whose cache state is a `KV` of the canvas.

    Args:
      contiguous: the tokens of a call are one range, the same in every row.
      remat: recompute each block in the backward pass.
      dropout: of all layers, which then are `numbered`. Blocks without a cache state only.
    """

    def block(params, h, inputs):
        if dropout is not None:
            inputs = inputs._replace(dropout=dropout.of_layer(params["number"]))
            params = params["layer"]
        return block_of(cfg, params)(params, h, inputs)

    def project(params, h, inputs):
        return block_of(cfg, params)(params, h, inputs, method="project")

    def write_kv(kv, new, inputs, keep):
        return write(kv, new, inputs.slots, contiguous=contiguous, keep=keep)

    def mix(params, h, q, kv, inputs):
        return block_of(cfg, params)(params, h, q, kv, inputs, method="mix")

    return Layer(jax.checkpoint(block) if remat else block, project, write_kv, mix)


def run_layers(
    cfg: ModelConfig,
    params: trees.Params,
    tokens: Int[Array, "B T"],
    valid: Bool[Array, "B T"] | None,
    policy: Policy | None = None,
    *,
    time: Float[Array, "B"] | None = None,
    step: Int[Array, ""] | int = 0,
    sequence_keys: PyTree = None,
    prompt_length: int = 0,
    executor: Executor = "auto",
    observe: Callable[[Array, Array], PyTree] | None = None,
    remat: bool = False,
    dropout: Dropout | None = None,
) -> StackOutput:
    """From a whole sequence to the residual stream before the final norm.

    Args:
      valid: False at padding, which no token attends to. None means no padding, and is faster.
      time: of denoising, t in (0, 1], 1 where all is masked; None: 0. Read by models with
        `time_conditioning` only.
      prompt_length: no token before this one is masked, so routers need not look there.
      remat: recompute each block in the backward pass.
      dropout: of what each block adds to the stream; None in inference. For executor "select".
    """
    masked = is_masked(cfg, tokens) if valid is None else is_masked(cfg, tokens) & valid
    rows = block_inputs(cfg, valid, tokens.shape)
    layers = _fold_layers(cfg, params)["layers"]
    return run_stack(
        layer_of(cfg, remat=remat, dropout=dropout),
        layers if dropout is None else numbered(layers),
        embed(cfg, params, tokens, rows),
        rows._replace(c=conditioning(cfg, params, time)),
        policy,
        Denoising(masked, jnp.asarray(step), sequence_keys, prompt_length),
        executor=executor,
        observe=observe,
    )


def is_masked(cfg: ModelConfig, tokens: Int[Array, "*B T"]) -> Bool[Array, "*B T"]:
    """Where a token is [MASK]; nowhere, in a model without one."""
    return jnp.zeros(tokens.shape, bool) if cfg.mask_id is None else tokens == cfg.mask_id


def head_logits(
    cfg: ModelConfig,
    params: trees.Params,
    h: Float[Array, "B T D"],
    time: Float[Array, "B"] | None = None,
) -> Float[Array, "B T V"]:
    """Final norm and head of the rows given: float32 logits."""
    head = params["head"]
    return parts(cfg, ready="padded" in head).head(head, apply_final_norm(cfg, params, h, time))


def apply_subs(cfg: ModelConfig, logits: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
    """The logits of what the model may predict: all tokens, or all but [MASK] (SUBS)."""
    return suppress_mask_token(cfg, logits) if cfg.subs else logits


def suppress_mask_token(cfg: ModelConfig, logits: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
    """Logits that never name [MASK]."""
    # A comparison joins its neighbours in one kernel; a scatter would not.
    return jnp.where(jnp.arange(logits.shape[-1]) == cfg.mask_id, -jnp.inf, logits)


def apply_final_norm(
    cfg: ModelConfig,
    params: trees.Params,
    h: Float[Array, "B T D"],
    time: Float[Array, "B"] | None = None,
) -> Float[Array, "B T D"]:
    """The stream after the final norm: what the head multiplies."""
    if not cfg.cond_dim:
        return parts(cfg).final_norm(params["final_norm"], h)
    c = conditioning(cfg, params, time)
    return parts(cfg, ready=True).final_norm(_fold_final(cfg, params)["final_norm"], h, c)


def shift_to_predicted(
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


def predict_logits(
    cfg: ModelConfig,
    params: trees.Params,
    h: Float[Array, "B T D"],
    valid: Bool[Array, "B T"] | None = None,
    time: Float[Array, "B"] | None = None,
) -> Float[Array, "B T V"]:
    """Float32 logits: row i predicts token i, or token i + 1 in a causal model."""
    return head_logits(cfg, params, shift_to_predicted(cfg, h, valid), time)
