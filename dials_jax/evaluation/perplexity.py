"""Generative perplexity: how likely a causal language model finds what another model sampled.

A small value alone says little: repeating one word gives the smallest. So the entropy of the tokens
of a sample is always reported beside it.

Source: `_eval_generative_perplexity` of kuleshov-group/mdlm for which tokens count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dials_jax import sharding
from dials_jax.compiling import timed_jit
from dials_jax.config import ModelConfig
from dials_jax.data.tokenizer import Tokenizer
from dials_jax.diffusion.objectives import masked_log_probs
from dials_jax.errors import require
from dials_jax.evaluation.positions import over_positions
from dials_jax.models import transformer
from dials_jax.models.model import Model
from dials_jax.statistics import mean_interval

Aggregate = Literal["mean", "corpus"]

SAMPLE_CHUNK = 128  # scored together; bounds the memory that logits take


class SampleScores(NamedTuple):
    """The scorer's log-likelihood of each sample."""

    nll: Float[np.ndarray, "N"]  # nats, summed over the tokens that count
    weight: Float[np.ndarray, "N"]  # how many count


class Estimate(NamedTuple):
    """A mean over samples and its 95 % interval."""

    value: float
    low: float
    high: float


def score_samples(
    scorer: Model, samples: Int[np.ndarray, "N T"], batch_size: int = 16
) -> SampleScores:
    """Scores samples of the scorer's own tokens, in float32.

    Raises: InputError for a scorer that is not causal, too short, or of a smaller vocabulary.
    """
    check_scorer(scorer.config, samples.shape[1])
    highest = int(samples.max())
    require(
        highest < scorer.config.vocab_size,
        f"samples hold token {highest}, outside the scorer's {scorer.config.vocab_size}; "
        "retokenise them",
    )
    counted = counts(samples, scorer.config.eos_id)
    found = []
    for first in range(0, len(samples), batch_size):
        rows = slice(first, first + batch_size)
        placed = scorer.place_sequences((samples[rows].astype(np.int32), counted[rows]), batch_size)
        nll, _ = scorer.run(nll_program, *placed)
        found.append(sharding.to_host(nll).astype(np.float64)[: len(samples[rows])])
    return SampleScores(np.concatenate(found), counted[:, 1:].sum(axis=1).astype(np.float64))


def check_scorer(cfg: ModelConfig, length: int) -> None:
    """Raises: InputError for a model that cannot score samples of this length."""
    require(
        cfg.causal,
        f"the scorer ({cfg.model_type}) is not causal; give a model that predicts the next token",
    )
    require(cfg.eos_id is not None, "the scorer has no eos_id; set it in the model's config")
    require(
        length <= cfg.max_length,
        f"samples of {length} tokens do not fit the scorer's {cfg.max_length} positions; "
        "lower score_length",
    )


def counts(tokens: Int[np.ndarray, "N T"], eos_id: int) -> Bool[np.ndarray, "N T"]:
    """Which tokens count: all but end of text, and of those the first.

    Text after an end of text counts, as in the reference; padding is end of text and does not.
    The first token of a sample is predicted from nothing, so it is never scored.
    """
    ends = tokens == eos_id
    return ~ends | (ends & (np.cumsum(ends, axis=1) == 1))


def retokenise(
    samples: Int[np.ndarray, "N T"],
    source: Tokenizer,
    target: Tokenizer,
    source_eos: int,
    target_eos: int,
    length: int,
) -> Int[np.ndarray, "N length"]:
    """The text of the samples in another vocabulary, cut or padded with end of text to `length`.

    Text between ends of text is decoded piece by piece, so that neither tokenizer needs to know
    the other's end of text.
    """
    out = np.full((len(samples), length), target_eos, np.int32)
    plain = target.for_documents()
    for row, sample in zip(out, samples, strict=True):
        ends = np.flatnonzero(sample == source_eos)
        pieces = [piece[piece != source_eos] for piece in np.split(sample, ends)]
        encoded = plain.encode_batch([source.decode(piece) for piece in pieces])
        ids = [*encoded[0]]
        for piece in encoded[1:]:
            ids += [target_eos, *piece]
        row[: len(ids)] = ids[:length]
    return out


def unigram_entropy(samples: Int[np.ndarray, "N T"]) -> Float[np.ndarray, "N"]:
    """Entropy of the tokens within each sample, in nats; at most log T."""

    def one(sample):
        shares = np.unique(sample, return_counts=True)[1] / len(sample)
        return -np.sum(shares * np.log(shares))

    return np.array([one(sample) for sample in samples])


def perplexities(scores: SampleScores, aggregate: Aggregate) -> Float[np.ndarray, "N"]:
    """One number for each sample, whose mean is the perplexity.

    "mean": the samples' own perplexities. "corpus": the mean is exp(sum of nll / sum of weights),
    and the spread that of its linearisation, so that intervals and paired comparisons hold for
    either.

    A sample without a token that counts has perplexity 1; its entropy of 0 shows it.
    """
    if aggregate == "mean":
        return np.exp(scores.nll / np.maximum(scores.weight, 1))
    rate = scores.nll.sum() / max(scores.weight.sum(), 1)
    residual = scores.nll - rate * scores.weight
    return np.exp(rate) * (1 + residual / max(scores.weight.mean(), 1))


def estimate(values: Sequence[float] | Float[np.ndarray, "N"]) -> Estimate:
    """The mean and Student's t interval."""
    return Estimate(float(np.mean(values)), *mean_interval(values))


@timed_jit("cfg")
def nll_program(
    params, tokens: Int[Array, "B T"], counted: Bool[Array, "B T"], *, cfg: ModelConfig
) -> Float[Array, "B"]:
    # By default an accelerator multiplies float32 in lower precision.
    with jax.default_matmul_precision("highest"):
        h = transformer.run_layers(cfg, params, tokens, None).h

        def nll(h, targets, counted):
            return -masked_log_probs(transformer.head_logits(cfg, params, h), targets, counted)

        return jnp.sum(
            over_positions(nll, SAMPLE_CHUNK, h[:, :-1], tokens[:, 1:], counted[:, 1:]), axis=1
        )
