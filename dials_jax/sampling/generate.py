"""`generate`: from prompts to text, as one compiled program with nothing fetched inside it."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from dials_jax.caching.cache import Cache, NoCache, Work
from dials_jax.caching.net import Net
from dials_jax.config import InputError, ModelConfig, require
from dials_jax.models import transformer
from dials_jax.models.model import Model, row_keys
from dials_jax.nn.stack import Executor, Policy
from dials_jax.sampling.autoregressive import Autoregressive, decode, filler
from dials_jax.sampling.denoise import Record, Sampler, blocks_of, denoise
from dials_jax.skipping.flops import Flops, count_flops
from dials_jax.skipping.policies import router_width
from dials_jax.timing import Timed


@dataclass(frozen=True)
class Generation:
    """Generated rows and what they cost.

    Attributes:
      tokens: [B, P + G], the prompts (padding as given) and the generated tokens.
      nfe: model calls. Under guidance a call has twice the rows.
      gates: [nfe, L, R], True where a layer ran. R is B, or 2B under guidance: the conditional
        rows, then the unconditional ones.
      masked_share: [nfe, R], masked share of the generated part before each call.
      tokens_run: [nfe, L], tokens of each row that a layer computes where it runs.
      flops: the three numbers of `dials_jax.skipping.flops`; the model's share is of as many calls
        on the whole canvas.
    """

    tokens: Int[np.ndarray, "B T"]
    nfe: int
    gates: Bool[np.ndarray, "S L R"]
    masked_share: Float[np.ndarray, "S R"]
    tokens_run: Int[np.ndarray, "S L"]
    flops: Flops


def generate(
    model: Model,
    prompts: Int[ArrayLike, "B P"],
    valid: Bool[ArrayLike, "B P"] | None = None,
    *,
    sampler: Sampler | Autoregressive,
    policy: Policy | None = None,
    cache: Cache | None = None,
    key: jax.Array | None = None,
    executor: Executor = "auto",
    fill_to: int = 1,
) -> Generation:
    """Generates `sampler.gen_length` tokens after every prompt.

    Args:
      prompts: token ids, padded on the left.
      valid: False at padding; None means that there is none, and is faster.
      policy: which layers run at which step; None runs all.
      cache: what a step runs; None runs the whole canvas. A layer that a policy skips leaves its
        keys and values in the cache as they were.
      key: one key (folded with the row's number), or one a row, so that a row's result does not
        depend on its place in a batch. None is `jax.random.key(0)`.
      fill_to: run the program of this batch size, or of a multiple, also for fewer rows.

    Raises: InputError for prompts that contain [MASK], padding that is not on the left, more
      tokens than the model has positions for, or settings that do not compose.
    """
    prompts = np.asarray(prompts)
    present = check_prompts(model.config, prompts, valid, sampler.gen_length)
    if isinstance(sampler, Autoregressive):
        sampler.check(model.config, present, policy, cache)
    else:
        model.config.require_mask()
    num_rows, cache = len(prompts), cache or NoCache()
    rows = (jnp.asarray(prompts, jnp.int32), valid, row_keys(key, num_rows))
    static = {"sampler": sampler, "cache": cache, "executor": executor}
    rows = model.place_rows(rows, fill_to)
    (tokens, record), seconds = model.run(_generate, *rows, policy, **static)
    tokens, (nfe, gates, share, kind) = jax.device_get((tokens, record))
    # Rows that only fill up the batch are dropped, in both halves under guidance.
    gates = gates[:nfe, :, np.arange(gates.shape[-1]) % len(tokens) < num_rows]
    share = np.tile(share[:nfe, :num_rows], gates.shape[-1] // num_rows)
    work = work_of(model.config, sampler, cache, prompts.shape[1])
    tokens_run = np.array([w.tokens for w in work])[kind[:nfe]]
    flops = count_flops(
        model.config,
        gates,
        num_tokens=tokens.shape[1],
        head_tokens=np.array([w.head for w in work])[kind[:nfe]],
        tokens_run=tokens_run,
        voting=tokens_run - np.array([[w.prompt] for w in work])[kind[:nfe]],
        d_router=router_width(policy),
        seconds=seconds,
    )
    return Generation(tokens[:num_rows], int(nfe), gates, share, tokens_run, flops)


def work_of(
    cfg: ModelConfig, sampler: Sampler | Autoregressive, cache: Cache, prompt_length: int
) -> list[Work]:
    """What each kind of model call computes."""
    if isinstance(sampler, Autoregressive):
        return sampler.work(cfg, prompt_length)
    length = prompt_length + sampler.gen_length
    rows = jax.eval_shape(lambda: transformer.rows_of(cfg, None, (1, length)))
    known = prompt_length if sampler.cfg_scale == 0 else 0
    sketch = Net(cfg, None, None, "auto", rows, None, None, known)
    return [p.work for p in cache.passes(sketch, blocks_of(sampler, prompt_length))]


def check_prompts(
    cfg: ModelConfig, prompts: np.ndarray, valid: Bool[ArrayLike, "B P"] | None, gen_length: int
) -> Bool[np.ndarray, "B P"]:
    """Refuses prompts that the sampler would silently garble; returns where they are real."""
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
    return present


def _generate_fn(
    params, prompts, valid, keys, policy, *, cfg: ModelConfig, sampler, cache, executor
) -> tuple[Int[Array, "B T"], Record]:
    causal = isinstance(sampler, Autoregressive)
    blank = filler(cfg) if causal else cfg.mask_id
    answer = jnp.full((prompts.shape[0], sampler.gen_length), blank, prompts.dtype)
    canvas = jnp.concatenate([prompts, answer], axis=1)
    if valid is not None:
        valid = jnp.concatenate([valid, jnp.ones_like(answer, bool)], axis=1)
    noise_keys, gate_keys, uncond_gate_keys = jax.vmap(lambda k: jax.random.split(k, 3))(keys).T
    given, prompt_length = None, prompts.shape[1]
    if sampler.cfg_scale > 0:
        given = jnp.broadcast_to(jnp.arange(canvas.shape[1]) < prompt_length, canvas.shape)
        gate_keys = jnp.concatenate([gate_keys, uncond_gate_keys])
        valid = None if valid is None else jnp.concatenate([valid, valid])
    net = Net(
        cfg,
        params,
        policy,
        executor,
        transformer.rows_of(cfg, valid, (gate_keys.shape[0], canvas.shape[1])),
        gate_keys,
        given,
        prompt_length if given is None else 0,
    )
    if causal:
        return decode(sampler, net, canvas, noise_keys, prompt_length)
    return denoise(sampler, cache, net, canvas, noise_keys, prompt_length)


_generate = Timed(_generate_fn, static_argnames=("cfg", "sampler", "cache", "executor"))
