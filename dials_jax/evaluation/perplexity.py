"""Generative perplexity: the perplexity of a model's samples under a causal language model.

Low perplexity alone means little: repetition of one word has the lowest. The entropy of the tokens
within a sample is therefore always reported with it.

Source: `_eval_generative_perplexity` of kuleshov-group/mdlm, for which tokens count.
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
from dials_jax.evaluation.position_chunks import map_position_chunks
from dials_jax.models import transformer
from dials_jax.models.model import Model
from dials_jax.statistics import mean_interval

Aggregate = Literal["mean", "corpus"]

SAMPLE_CHUNK = 128  # positions whose logits are in memory at a time


class SampleScores(NamedTuple):
    """The scorer's negative log-likelihood of each sample."""

    nll: Float[np.ndarray, "N"]  # nats, summed over the tokens that count
    weight: Float[np.ndarray, "N"]  # number of tokens that count


class Estimate(NamedTuple):
    """A mean over samples, and its 95 % interval."""

    value: float
    low: float
    high: float


def score_samples(
    scorer: Model, samples: Int[np.ndarray, "N T"], batch_size: int = 16
) -> SampleScores:
    """Scores samples in the scorer's vocabulary, in float32.

    Raises: InputError for a scorer that is not causal, too short, or of a smaller vocabulary.
    """
    check_scorer(scorer.config, samples.shape[1])
    highest = int(samples.max())
    require(
        highest < scorer.config.vocab_size,
        f"samples hold token {highest}, outside the scorer's {scorer.config.vocab_size}; "
        "retokenise them",
    )
    counted = counted_tokens(samples, scorer.config.eos_id)
    nll_of_batches = []
    for first in range(0, len(samples), batch_size):
        tokens = samples[first : first + batch_size].astype(np.int32)
        placed = scorer.place_sequences((tokens, counted[first : first + batch_size]), batch_size)
        nll, _ = scorer.run(nll_program, *placed)
        nll_of_batches.append(sharding.to_host(nll).astype(np.float64)[: len(tokens)])
    return SampleScores(
        np.concatenate(nll_of_batches), counted[:, 1:].sum(axis=1).astype(np.float64)
    )


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
        "lower score_length, or the length of the samples",
    )


def counted_tokens(tokens: Int[np.ndarray, "N T"], eos_id: int) -> Bool[np.ndarray, "N T"]:
    """Marks the tokens that count: all but the second and later ends of text of a sample.

    As in the reference, text after an end of text counts, and padding, which is end of text, does
    not. (The first token of a sample is never scored: nothing predicts it.)
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
    """Decodes samples and encodes the text in another vocabulary.

    Results are cut, or padded with end of text, to `length`. Pieces between ends of text are
    decoded separately, so that neither tokenizer needs to know the other's end of text.
    """
    out = np.full((len(samples), length), target_eos, np.int32)
    plain = target.for_documents()
    for result, sample in zip(out, samples, strict=True):
        ends = np.flatnonzero(sample == source_eos)
        pieces = [piece[piece != source_eos] for piece in np.split(sample, ends)]
        encoded = plain.encode_batch([source.decode(piece) for piece in pieces])
        ids = [*encoded[0]]
        for piece in encoded[1:]:
            ids += [target_eos, *piece]
        result[: len(ids)] = ids[:length]
    return out


def unigram_entropy(samples: Int[np.ndarray, "N T"]) -> Float[np.ndarray, "N"]:
    """Computes the entropy of the tokens within each sample, in nats; at most log T."""

    def entropy(sample):
        shares = np.unique(sample, return_counts=True)[1] / len(sample)
        return -np.sum(shares * np.log(shares))

    return np.array([entropy(sample) for sample in samples])


def perplexities(scores: SampleScores, aggregate: Aggregate) -> Float[np.ndarray, "N"]:
    """Computes one number per sample; their mean is the perplexity.

    With "mean" they are the samples' own perplexities. With "corpus" their mean is
    exp(sum of nll / sum of weights), and their spread is that of its linearisation. So intervals
    and paired comparisons are valid for both.

    A sample without a token that counts has perplexity 1 (and entropy 0).
    """
    if aggregate == "mean":
        return np.exp(scores.nll / np.maximum(scores.weight, 1))
    rate = scores.nll.sum() / max(scores.weight.sum(), 1)
    residual = scores.nll - rate * scores.weight
    return np.exp(rate) * (1 + residual / max(scores.weight.mean(), 1))


def estimate_mean(values: Sequence[float] | Float[np.ndarray, "N"]) -> Estimate:
    """Estimates the mean, with Student's 95 % interval."""
    return Estimate(float(np.mean(values)), *mean_interval(values))


@timed_jit("cfg")
def nll_program(
    params, tokens: Int[Array, "B T"], counted: Bool[Array, "B T"], *, cfg: ModelConfig
) -> Float[Array, "B"]:
    """The negative log-likelihood of each sequence in nats, summed over the tokens that count."""
    # By default an accelerator multiplies float32 in lower precision.
    with jax.default_matmul_precision("highest"):
        h = transformer.run_layers(cfg, params, tokens, None).h

        def nll(h, targets, counted):
            return -masked_log_probs(transformer.head_logits(cfg, params, h), targets, counted)

        return jnp.sum(
            map_position_chunks(nll, SAMPLE_CHUNK, h[:, :-1], tokens[:, 1:], counted[:, 1:]), axis=1
        )
