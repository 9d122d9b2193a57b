"""The transformer of every family; `ModelConfig` tells them apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from dials_jax import trees
from dials_jax.config import ModelConfig
from dials_jax.diffusion.subs import suppress_token
from dials_jax.keys import threefry_key
from dials_jax.nn.block import VOCABULARY_UNIT, Block, BlockInputs, Embed, Head, pad_vocabulary
from dials_jax.nn.dropout import Dropout, numbered
from dials_jax.nn.kv import Slots, gather, write_slots
from dials_jax.nn.mask import Mask
from dials_jax.nn.modulation import TimeEmbed, make_final_norm, precompute_modulation
from dials_jax.nn.modules import Form, bind, form_of, init_module, init_stacked
from dials_jax.nn.policy import Denoising, Policy
from dials_jax.nn.rope import positions_of, rope_angles
from dials_jax.nn.stack import Executor, Layer, StackOutput, run_stack

NOISE_EPS = 1e-3  # of the linear schedule, whose noise is finite at t = 1


# ------------------------------------------------------------------------------- parameters

GROUPS = {
    "embed": Embed,
    "layers": Block,
    "final_norm": make_final_norm,
    "head": Head,
    "time": TimeEmbed,  # of a model with adaLN
}


def init(cfg: ModelConfig, key: jax.Array) -> trees.Params:
    """Random float32 parameters in the plain form, layers stacked."""
    key = threefry_key(key)
    embed_key, layers_key, head_key = jax.random.split(key, 3)
    params = {
        "embed": init_group(cfg, "embed", embed_key),
        "layers": init_stacked(Block, layers_key, cfg.num_layers, cfg),
        "final_norm": init_group(cfg, "final_norm", head_key),
        "head": init_group(cfg, "head", head_key),
    }
    if cfg.cond_dim:
        params["time"] = init_group(cfg, "time", jax.random.fold_in(key, 3))
    return params


def init_group(cfg: ModelConfig, name: str, key: jax.Array) -> trees.Params:
    """Random float32 parameters of one group; of one layer for the group "layers"."""
    return init_module(GROUPS[name], key, cfg)


def prepare_for_inference(cfg: ModelConfig, params: trees.Params) -> trees.Params:
    """Parameters prepared for inference: what is the same in every call is computed once.

    The modulations of a constant conditioning are there, and the head's kernel once more with its
    vocabulary padded. Every function here takes the parameters either way, with equal results.
    """
    head, form = params["head"], form_of(params)
    pads = cfg.vocab_size % VOCABULARY_UNIT != 0
    if pads and not form.padded_head:
        head = {**head, "padded": pad_vocabulary(head["kernel"])}
    return {
        **params,
        "layers": _modulated_layers(cfg, params),
        "final_norm": _modulated_norm(cfg, params),
        "head": head,
        "form": replace(form, modulated=bool(cfg.cond_dim), padded_head=pads),
    }


def _modulated_layers(cfg: ModelConfig, params: trees.Params) -> trees.Params:
    layers = params["layers"]
    if not cfg.cond_dim or form_of(params).modulated:
        return layers
    modulate = partial(precompute_modulation, cfg, c=_constant(cfg, params))
    return tuple(map(modulate, layers)) if trees.is_unrolled(layers) else modulate(layers)


def _modulated_norm(cfg: ModelConfig, params: trees.Params) -> trees.Params:
    norm = params["final_norm"]
    if not cfg.cond_dim or form_of(params).modulated:
        return norm
    return precompute_modulation(cfg, norm, _constant(cfg, params))


def _constant(cfg: ModelConfig, params: trees.Params) -> Float[Array, "C"]:
    return bind(TimeEmbed, params["time"], cfg)(jnp.zeros(1))[0]


def conditioning(
    cfg: ModelConfig, params: trees.Params, time: Float[Array, "B"] | None
) -> Float[Array, "B C"] | None:
    """What modulates the layers at the denoising time t; None where that is the constant.

    The time enters as sigma = -log(1 - (1 - 1e-3) t), the total noise of the linear schedule.
    """
    if time is None or not cfg.time_conditioning:
        return None
    sigma = -jnp.log1p(-(1 - NOISE_EPS) * time.astype(jnp.float32))
    return bind(TimeEmbed, params["time"], cfg)(sigma)


# ----------------------------------------------------------------------------------- layers


def block_inputs(
    cfg: ModelConfig,
    valid: Bool[Array, "B T"] | None,
    shape: tuple[int, int],
    positions: Int[Array, "B T"] | None = None,
) -> BlockInputs:
    """Inputs of blocks for whole sequences.

    Args:
      positions: None: they count from the first token not padding. Rotary embeddings only.
    """
    index = jnp.broadcast_to(jnp.arange(shape[1]), shape)
    mask = Mask(valid, cfg.causal, cfg.block_length)
    if cfg.rope_theta is None:
        return BlockInputs(None, mask, Slots(index))
    if positions is None:
        positions = index if valid is None else positions_of(valid)
    return BlockInputs(rope_angles(positions, cfg.head_dim, cfg.rope_theta), mask, Slots(index))


def embed(
    cfg: ModelConfig, params: trees.Params, tokens: Int[Array, "B T"], inputs: BlockInputs
) -> Float[Array, "B T D"]:
    """The residual stream before the first layer."""
    positions = None
    if cfg.rope_theta is None:
        index = inputs.slots.index
        valid = inputs.mask.valid
        positions = index if valid is None else gather(positions_of(valid), index)
    return bind(Embed, params["embed"], cfg)(tokens, positions)


def layer_of(
    cfg: ModelConfig,
    form: Form,
    *,
    contiguous: bool = False,
    remat: bool = False,
    dropout: Dropout | None = None,
) -> Layer:
    """The model's block, whose cache state is a `KV` of the canvas.

    Args:
      form: of the layers' parameters.
      contiguous: the tokens of a call are one range, the same in every sequence.
      remat: recompute each block in the backward pass.
      dropout: of all layers, which then are `numbered`. Blocks without a cache state only.
    """

    def bound(params) -> Block:
        return bind(Block, params, cfg, form=form)

    def block(params, h, inputs):
        if dropout is not None:
            inputs = inputs._replace(dropout=dropout.of_layer(params["number"]))
            params = params["layer"]
        return bound(params)(h, inputs)

    def project(params, h, inputs):
        return bound(params).project(h, inputs)

    def write_kv(kv, new, inputs, keep):
        return write_slots(kv, new, inputs.slots, contiguous=contiguous, keep=keep)

    def mix(params, h, q, kv, inputs):
        return bound(params).mix(h, q, kv, inputs)

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
      prompt_length: this many first tokens are never masked: routers leave them out.
      remat: recompute each block in the backward pass.
      dropout: of what each block adds to the stream; None in inference. For executor "select".
    """
    masked = is_masked(cfg, tokens) if valid is None else is_masked(cfg, tokens) & valid
    inputs = block_inputs(cfg, valid, tokens.shape)
    layers = _modulated_layers(cfg, params)
    form = replace(form_of(params), modulated=bool(cfg.cond_dim))
    return run_stack(
        layer_of(cfg, form, remat=remat, dropout=dropout),
        layers if dropout is None else numbered(layers),
        embed(cfg, params, tokens, inputs),
        inputs._replace(c=conditioning(cfg, params, time)),
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
    """Final norm and head at the positions given: float32 logits."""
    head = bind(Head, params["head"], cfg, form=form_of(params))
    return head(apply_final_norm(cfg, params, h, time))


def apply_subs(cfg: ModelConfig, logits: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
    """Logits of what the model may predict: all tokens, or all but [MASK] (SUBS)."""
    return suppress_mask_token(cfg, logits) if cfg.subs else logits


def suppress_mask_token(cfg: ModelConfig, logits: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
    """Logits of which [MASK] is never drawn."""
    return suppress_token(logits, cfg.mask_id)


def apply_final_norm(
    cfg: ModelConfig,
    params: trees.Params,
    h: Float[Array, "B T D"],
    time: Float[Array, "B"] | None = None,
) -> Float[Array, "B T D"]:
    """The stream after the final norm: what the head multiplies."""
    form = Form(modulated=bool(cfg.cond_dim))
    norm = bind(make_final_norm, _modulated_norm(cfg, params), cfg, form=form)
    return norm(h, conditioning(cfg, params, time)) if cfg.cond_dim else norm(h)


def shift_to_predicted(
    cfg: ModelConfig, h: Float[Array, "B T D"], valid: Bool[Array, "B T"] | None = None
) -> Float[Array, "B T D"]:
    """Undoes the right shift: position i then predicts token i. As it is, unless `cfg.right_shift`.

    Args:
      valid: False at padding; None: no padding.
    """
    return move_right(h, valid) if cfg.right_shift else h


def move_right(
    h: Float[Array, "B T D"], valid: Bool[Array, "B T"] | None = None
) -> Float[Array, "B T D"]:
    """Moves the stream to the token that each position predicts where that is the next one.

    The stream is moved before the head, whose logits are many times as wide. Nothing predicts a
    sequence's first token: there its own state stays, so that padding on the left changes no
    prediction.

    Args:
      valid: False at padding; None: no padding.
    """
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
    """Float32 logits: position i predicts token i, or token i + 1 in a causal model."""
    return head_logits(cfg, params, shift_to_predicted(cfg, h, valid), time)
