"""Measures how far light models are from the heavy one at each noise level (Sedykh, section 4.1).

What a light step loses can be measured without sampling. Under the linear schedule, equal parts of
the time axis reveal equal numbers of tokens. For long sequences, a model schedule therefore loses
the integral of the difference in cross-entropy, over the times of its light steps, in likelihood
bound. The divergence of its samples from the heavy model's is bounded by the integral of
KL(heavy || light), assuming that partially generated text is distributed like masked real text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dials_jax import sharding, trees
from dials_jax.compiling import timed_jit
from dials_jax.config import ModelConfig
from dials_jax.diffusion.objectives import token_kl
from dials_jax.diffusion.subs import subs_log_probs
from dials_jax.errors import require
from dials_jax.evaluation.position_chunks import map_position_chunks
from dials_jax.keys import fold_in_each, seed_key
from dials_jax.models import transformer
from dials_jax.models.model import Model

POSITION_CHUNK = 64  # positions whose logits, of all models, are in memory at a time


class Divergence(NamedTuple):
    """Compares a model with the heavy one, per masked sequence; NaN where nothing was masked."""

    loss_gap: Float[np.ndarray, "N"]  # cross-entropy - the heavy model's; nats per masked token
    kl: Float[np.ndarray, "N"]  # KL(heavy || model); nats per masked token


def divergences(
    heavy: Model,
    others: Mapping[str, Model],
    tokens: Int[np.ndarray, "N T"],
    time: float,
    *,
    seed: int = 0,
    batch_size: int = 16,
) -> dict[str, Divergence]:
    """Compares models on sequences masked with probability `time`: Sedykh (5), (6) and (7).

    All models get the same masks, which depend only on the seed, the time and the index of the
    sequence.

    Raises: InputError for models of different vocabularies, or whose outputs are NaN or infinite.
    """
    check_family(heavy.config, {letter: other.config for letter, other in others.items()})
    # Keys fold the time itself, so that a finer grid of times repeats those of a coarser one.
    time_key = jax.random.fold_in(seed_key(seed), round(time * 1e6))
    keys = fold_in_each(time_key, np.arange(len(tokens)))
    params = tuple(other.params for other in others.values())
    configs = tuple(other.config for other in others.values())
    found = []
    for first in range(0, len(tokens), batch_size):
        batch = slice(first, first + batch_size)
        placed = heavy.place_sequences((tokens[batch].astype(np.int32), keys[batch]), batch_size)
        out, _ = heavy.run(compare_program, params, *placed, jnp.float32(time), other_cfgs=configs)
        found.append(sharding.to_host(out))
    # Only the last batch was filled up.
    means, count = jax.tree.map(lambda *parts: np.concatenate(parts)[: len(tokens)], *found)
    for letter, pair in zip(others, means, strict=True):
        require(
            bool(np.isfinite(pair).all()),
            f"model {letter!r} or the heavy one outputs NaN or infinity at t={time:g}; look for "
            "NaN in their weights, or for values that overflow their dtype",
        )
    means = jax.tree.map(lambda x: np.where(count > 0, x, np.nan), means)
    return {letter: Divergence(*pair) for letter, pair in zip(others, means, strict=True)}


def check_family(heavy: ModelConfig, others: Mapping[str, ModelConfig]) -> None:
    """Raises: InputError for models whose vocabularies or [MASK] differ."""
    heavy.require_mask()
    for letter, cfg in others.items():
        cfg.require_mask()
        ids = (cfg.vocab_size, cfg.mask_id)
        require(
            ids == (heavy.vocab_size, heavy.mask_id),
            f"model {letter!r} has vocab_size and mask_id {ids}, but the heavy model "
            f"{(heavy.vocab_size, heavy.mask_id)}; compare models of one vocabulary",
        )


@timed_jit("cfg", "other_cfgs")
def compare_program(
    params: trees.Params,
    other_params: tuple[trees.Params, ...],
    tokens: Int[Array, "B T"],
    keys: jax.Array,
    time: Float[Array, ""],
    *,
    cfg: ModelConfig,
    other_cfgs: tuple[ModelConfig, ...],
) -> tuple[tuple[tuple[Float[Array, "B"], Float[Array, "B"]], ...], Int[Array, "B"]]:
    """Masks sequences and runs all models on them.

    Returns: for each other model the difference in cross-entropy and KL(heavy || other), as means
      over the masked tokens of each sequence (0 without any); and the numbers of masked tokens.
    """
    noise = jax.vmap(lambda key: jax.random.uniform(key, tokens.shape[1:]))(keys)
    masked = noise < time
    noisy = jnp.where(masked, cfg.mask_id, tokens)
    times = jnp.broadcast_to(time, tokens.shape[:1])
    models = ((cfg, params), *zip(other_cfgs, other_params, strict=True))
    # By default an accelerator multiplies float32 in lower precision.
    with jax.default_matmul_precision("highest"):
        hidden = [_hidden_states(*model, noisy, times) for model in models]

        def compare(hidden, tokens, noisy):
            first, *rest = [
                subs_log_probs(transformer.head_logits(*model, h, times), noisy, cfg.mask_id)
                for model, h in zip(models, hidden, strict=True)
            ]
            return [_gap_and_kl(first, other, tokens) for other in rest]

        sums = map_position_chunks(compare, POSITION_CHUNK, hidden, tokens, noisy)
    count = jnp.sum(masked, axis=1)
    means = jax.tree.map(lambda x: jnp.sum(x, axis=1) / jnp.maximum(count, 1), sums)
    return tuple(means), count


def _hidden_states(cfg, params, noisy, times) -> Float[Array, "B T D"]:
    h = transformer.run_layers(cfg, params, noisy, None, time=times).h
    return transformer.shift_to_predicted(cfg, h)


def _gap_and_kl(
    heavy: Float[Array, "B T V"], other: Float[Array, "B T V"], tokens: Int[Array, "B T"]
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Difference in cross-entropy, and KL(heavy || other), per token; 0 where it is not masked.

    Args:
      heavy, other: log-probabilities.
    """
    gap = jnp.take_along_axis(heavy - other, tokens[..., None], axis=-1)[..., 0]
    return gap, token_kl(heavy, other)


# ------------------------------------------------------------------------------------- curves


class Curve(NamedTuple):
    """The mean over sequences at each time, and its 95 % interval."""

    times: Float[np.ndarray, "S"]
    value: Float[np.ndarray, "S"]
    low: Float[np.ndarray, "S"]
    high: Float[np.ndarray, "S"]


def compute_curve(times: Sequence[float], values: Sequence[Float[np.ndarray, "N"]]) -> Curve:
    """Computes the mean and its interval per time.

    Args:
      values: per time, one value per sequence; NaN without a masked token, and then left out.
    """
    import scipy.stats

    points = []
    for of_sequences in values:
        finite = np.asarray(of_sequences, np.float64)
        finite = finite[np.isfinite(finite)]
        require(len(finite) > 1, "a time left fewer than two sequences masked; add sequences")
        half = scipy.stats.t.ppf(0.975, len(finite) - 1) * scipy.stats.sem(finite)
        points.append((finite.mean(), finite.mean() - half, finite.mean() + half))
    return Curve(np.asarray(times, np.float64), *np.array(points).T)


def compute_curves(
    times: Sequence[float], measured: Mapping[str, Sequence[Divergence]], second_heavy: str = ""
) -> dict[str, dict[str, Curve]]:
    """Computes the curves of all quantities: quantity -> letter of the model -> curve.

    Quantities: "loss" (Sedykh (6), the mean absolute difference), "gap" (the same with its sign),
    "kl" (Sedykh (7)), and with a second heavy model "relative_kl": KL minus the KL of that model,
    sequence by sequence.
    """

    def curves_of(value, letters) -> dict[str, Any]:
        return {
            letter: compute_curve(times, [value(letter, i) for i in range(len(times))])
            for letter in letters
        }

    light = [letter for letter in measured if letter != second_heavy]
    found = {
        "loss": curves_of(lambda letter, i: np.abs(measured[letter][i].loss_gap), measured),
        "gap": curves_of(lambda letter, i: measured[letter][i].loss_gap, measured),
        "kl": curves_of(lambda letter, i: measured[letter][i].kl, measured),
    }
    if second_heavy:
        base = [divergence.kl for divergence in measured[second_heavy]]
        found["relative_kl"] = curves_of(lambda letter, i: measured[letter][i].kl - base[i], light)
    return found
