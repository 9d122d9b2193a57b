"""`generate`: from prompts to text, as one compiled program with nothing fetched inside it."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from dials_jax.config import InputError, ModelConfig, require
from dials_jax.models import llada
from dials_jax.models.model import Model, row_keys
from dials_jax.nn.stack import Executor, Policy
from dials_jax.sampling.confidence import Confidence, Step, denoise
from dials_jax.skipping.flops import Flops, count_flops
from dials_jax.skipping.policies import router_width
from dials_jax.timing import Timed


@dataclass(frozen=True)
class Generation:
    """Generated rows and what they cost.

    Attributes:
      tokens: [B, P + G], the prompts (padding as given) and the generated tokens.
      nfe: model calls. Under guidance a call has twice the rows.
      gates: [steps, L, R], True where a layer ran. R is B, or 2B under guidance: the conditional
        rows, then the unconditional ones.
      masked_share: [steps, R], masked share of the generated part before each step.
      flops: the three numbers of `dials_jax.skipping.flops`.
    """

    tokens: Int[np.ndarray, "B T"]
    nfe: int
    gates: Bool[np.ndarray, "S L R"]
    masked_share: Float[np.ndarray, "S R"]
    flops: Flops


def generate(
    model: Model,
    prompts: Int[ArrayLike, "B P"],
    valid: Bool[ArrayLike, "B P"] | None = None,
    *,
    sampler: Confidence,
    policy: Policy | None = None,
    key: jax.Array | None = None,
    executor: Executor = "auto",
    fill_to: int = 1,
) -> Generation:
    """Generates `sampler.gen_length` tokens after every prompt.

    Args:
      prompts: token ids, padded on the left.
      valid: False at padding; None means that there is none.
      policy: which layers run at which step; None runs all.
      key: one key (folded with the row's number), or one a row, so that a row's result does not
        depend on its place in a batch. None is `jax.random.key(0)`.
      fill_to: run the program of this batch size, or of a multiple, also for fewer rows.

    Raises: InputError for prompts that contain [MASK], padding that is not on the left, or more
      tokens than the model has positions for.
    """
    prompts = np.asarray(prompts)
    check_prompts(model.config, prompts, valid, sampler.gen_length)
    num_rows = len(prompts)
    rows = (jnp.asarray(prompts, jnp.int32), valid, row_keys(key, num_rows))
    (tokens, steps), seconds = model.run(
        _generate, *model.place_rows(rows, fill_to), policy, sampler=sampler, executor=executor
    )
    tokens, gates, share = jax.device_get((tokens, steps.gates, steps.masked_share))
    # Rows that only fill up the batch are dropped, in both halves under guidance.
    keep = np.arange(gates.shape[-1]) % len(tokens) < num_rows
    gates, share = gates[..., keep], share[..., keep]
    flops = count_flops(
        model.config,
        gates,
        num_tokens=tokens.shape[1],
        head_tokens=sampler.block_length,
        d_router=router_width(policy),
        seconds=seconds,
    )
    return Generation(tokens[:num_rows], sampler.steps, gates, share, flops)


def check_prompts(
    cfg: ModelConfig, prompts: np.ndarray, valid: Bool[ArrayLike, "B P"] | None, gen_length: int
) -> None:
    """Refuses prompts that the sampler would silently garble."""
    require(prompts.ndim == 2, f"prompts have shape {prompts.shape}; give [batch, length]")
    total = prompts.shape[1] + gen_length
    require(
        total <= cfg.max_length,
        f"{prompts.shape[1]} prompt tokens and gen_length={gen_length} make {total}, but the "
        f"model has {cfg.max_length} positions; shorten one of them",
    )
    present = np.ones(prompts.shape, bool) if valid is None else np.asarray(valid)
    require(
        present.shape == prompts.shape,
        f"valid has shape {present.shape} and prompts {prompts.shape}; they must agree",
    )
    if (np.diff(present.astype(int), axis=1) < 0).any():
        raise InputError("prompts must be padded on the left: valid goes from True to False")
    outside = ((prompts < 0) | (prompts >= cfg.vocab_size)) & present
    if outside.any():
        row, column = np.argwhere(outside)[0]
        raise InputError(
            f"prompt {row} has token {prompts[row, column]}, outside the vocabulary of "
            f"{cfg.vocab_size}; use the model's own tokenizer"
        )
    rows = np.flatnonzero(((prompts == cfg.mask_id) & present).any(axis=1))
    if rows.size:
        raise InputError(
            f"prompt {rows[0]} contains [MASK] (id {cfg.mask_id}); remove it: masks in a prompt "
            "corrupt the quotas"
        )


def _generate_fn(
    params, prompts, valid, keys, policy, *, cfg: ModelConfig, sampler: Confidence, executor
) -> tuple[Int[Array, "B T"], Step]:
    answer = jnp.full((prompts.shape[0], sampler.gen_length), cfg.mask_id, prompts.dtype)
    canvas = jnp.concatenate([prompts, answer], axis=1)
    given = jnp.concatenate([jnp.ones_like(prompts, bool), jnp.zeros_like(answer, bool)], axis=1)
    if valid is not None:
        valid = jnp.concatenate([valid, jnp.ones_like(answer, bool)], axis=1)
    noise_keys, gate_keys, uncond_gate_keys = jax.vmap(lambda k: jax.random.split(k, 3))(keys).T
    guided = sampler.cfg_scale > 0
    if guided:
        gate_keys = jnp.concatenate([gate_keys, uncond_gate_keys])
        valid = None if valid is None else jnp.concatenate([valid, valid])

    def predict(tokens, start, step):
        if guided:
            tokens = jnp.concatenate([tokens, jnp.where(given, cfg.mask_id, tokens)])
        out = llada.run_layers(
            cfg, params, tokens, valid, policy, step=step, row_keys=gate_keys, executor=executor
        )
        # Only the block's tokens can be committed, so only they need logits.
        h = lax.dynamic_slice_in_dim(out.h, start, sampler.block_length, axis=1)
        logits = llada.logits_of(cfg, params, h)
        return guide(logits, sampler.cfg_scale) if guided else logits, out.gates

    tokens, steps = denoise(sampler, cfg, predict, canvas, noise_keys)
    if guided:
        share = jnp.concatenate([steps.masked_share] * 2, axis=1)
        steps = steps._replace(masked_share=share)
    return tokens, steps


def guide(logits: Float[Array, "R W V"], cfg_scale: float) -> Float[Array, "B W V"]:
    """Classifier-free guidance of the conditional (first) by the unconditional half."""
    conditional, unconditional = jnp.split(logits, 2)
    return unconditional + (cfg_scale + 1) * (conditional - unconditional)


_generate = Timed(_generate_fn, static_argnames=("cfg", "sampler", "executor"))
