"""Generative perplexity against plain loops."""

import jax
import numpy as np
import pytest
import scipy.stats

from dials_jax.data.tokenizer import character_tokenizer
from dials_jax.errors import InputError
from dials_jax.evaluation import perplexity
from dials_jax.evaluation.perplexity import (
    SampleScores,
    counted_tokens,
    estimate_mean,
    perplexities,
    retokenise,
    score_samples,
    unigram_entropy,
)
from dials_jax.models import families
from dials_jax.models.model import Model
from tests.conftest import init_params

EOS = 1
SCORES = SampleScores(np.array([10.0, 4.0, 30.0, 2.0]), np.array([5.0, 4.0, 10.0, 2.0]))


@pytest.fixture(scope="module")
def scorer():
    cfg = families.llada_small(
        2, 32, 24, 23, EOS, 0, causal=True, head_dim=8, max_length=32, dtype="float32"
    )
    return Model(cfg, jax.tree.map(lambda x: 4 * x, init_params(cfg)))


@pytest.fixture(scope="module")
def samples():
    rows = np.random.default_rng(0).integers(0, 24, (7, 12))
    rows[0, :] = EOS
    rows[1, 5:] = EOS  # padding: only the first counts
    rows[2, [0, 4]] = EOS  # text after end of text counts
    rows[3] = np.where(rows[3] == EOS, 2, rows[3])  # no end of text at all
    return rows


def test_scores_are_those_of_a_plain_loop(scorer, samples):
    scores = score_samples(scorer, samples, batch_size=4)
    for row, nll, weight in zip(samples, *scores, strict=True):
        log_probs = jax.nn.log_softmax(scorer.apply(row[None]).logits[0])
        expected, num_ends, counted = 0.0, int(row[0] == EOS), 0
        for i in range(1, len(row)):
            num_ends += row[i] == EOS
            if row[i] != EOS or num_ends == 1:
                expected -= float(log_probs[i - 1, row[i]])
                counted += 1
        assert weight == counted
        np.testing.assert_allclose(nll, expected, rtol=1e-5)
    assert scores.weight[0] == 0 and scores.weight[3] == len(samples[3]) - 1


def test_neither_batches_nor_slices_of_positions_matter(scorer, samples, monkeypatch):
    expected = score_samples(scorer, samples, batch_size=7)
    monkeypatch.setattr(perplexity, "SAMPLE_CHUNK", 5)  # 11 positions: the last slice is shorter
    # A program of its own, for the number of positions is read while tracing.
    monkeypatch.setattr(perplexity, "nll_program", perplexity.nll_program.traced_anew())
    for batch_size in (1, 3):
        scores = score_samples(scorer, samples, batch_size)
        np.testing.assert_allclose(scores.nll, expected.nll, rtol=1e-5)
    assert perplexity.nll_program.num_programs == 2  # a last, smaller batch needs none of its own


def test_which_tokens_count():
    rows = np.array([[1, 5, 1, 6, 1], [5, 6, 1, 1, 1], [5, 6, 7, 8, 9]])
    assert counted_tokens(rows, 1).astype(int).tolist() == [
        [1, 1, 0, 1, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1],
    ]


def test_retokenising_keeps_text_and_ends():
    source, target = character_tokenizer("abc"), character_tokenizer("xcba")
    eos, mask = source.token_to_id("[EOS]"), source.token_to_id("[MASK]")
    a, b, c = source.encode("abc")
    samples = np.array([[eos, a, b, eos, c, mask], [a, b, c, a, b, c]])
    out = retokenise(samples, source, target, eos, 1, length=5)
    A, B, C = target.encode("abc")
    assert (A, B, C) != (a, b, c)
    assert out.tolist() == [[1, A, B, 1, C], [A, B, C, A, B]]
    assert retokenise(samples[:, :3], source, target, eos, 1, 5)[0].tolist() == [1, A, B, 1, 1]


def test_the_mean_of_the_values_is_either_perplexity():
    own = np.exp(SCORES.nll / SCORES.weight)
    np.testing.assert_allclose(perplexities(SCORES, "mean"), own)
    corpus = np.exp(SCORES.nll.sum() / SCORES.weight.sum())
    assert np.isclose(perplexities(SCORES, "corpus").mean(), corpus)
    assert not np.isclose(corpus, own.mean())


def test_the_interval_of_the_corpus_perplexity_covers_its_spread():
    """The linearised standard error is that of many corpora drawn anew."""
    rng = np.random.default_rng(1)

    def draw():
        weight = rng.integers(20, 60, 200).astype(float)
        return SampleScores(weight * rng.normal(3, 0.3, 200), weight)

    found = [estimate_mean(perplexities(draw(), "corpus")) for _ in range(300)]
    spread = np.std([e.value for e in found])
    half_widths = [(e.high - e.low) / 2 / scipy.stats.t.ppf(0.975, 199) for e in found]
    assert np.isclose(np.mean(half_widths), spread, rtol=0.15)


def test_entropy_is_of_each_sample():
    entropy = unigram_entropy(np.array([[3, 3, 3, 3], [1, 1, 2, 2], [0, 1, 2, 3]]))
    np.testing.assert_allclose(entropy, [0, np.log(2), np.log(4)], atol=1e-12)


def test_what_cannot_score_is_refused(scorer, samples, model):
    with pytest.raises(InputError, match="not causal"):
        score_samples(model, samples)
    with pytest.raises(InputError, match="32 positions; lower score_length"):
        score_samples(scorer, np.zeros((1, 40), int))
    with pytest.raises(InputError, match="token 24, outside the scorer's 24"):
        score_samples(scorer, samples + 1)
