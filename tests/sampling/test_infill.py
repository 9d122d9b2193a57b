"""Masks inside sequences are filled, the most confident of all first; nothing else changes."""

import re

import numpy as np
import pytest

import dials_jax as dj
from dials_jax.errors import InputError
from dials_jax.models.model import Model
from dials_jax.skipping.routed import Routed
from tests.conftest import MASK, amplify, init_params, silence, small_config

SEQUENCES = [
    [5, MASK, 11, MASK, MASK, 7],
    [20, 21, 22, MASK, 4, 23, 8, MASK],
    [3, 4, MASK],
]


def filled_plainly(model, sequence, steps, threshold=None):
    """One sequence by plain forward passes: (tokens, calls)."""
    tokens = np.array(sequence)
    total = (tokens == MASK).sum()
    for step in range(steps):
        masked = np.flatnonzero(tokens == MASK)
        if not masked.size:
            return tokens, step
        logits = np.array(model.apply(tokens[None]).logits[0], np.float64)[masked]
        best = np.exp(logits.max(-1)) / np.exp(logits).sum(-1)
        order = np.argsort(-best, kind="stable")
        count = total // steps + (step < total % steps)
        chosen = order[:count] if threshold is None else order[: max(1, (best >= threshold).sum())]
        tokens[masked[chosen]] = logits.argmax(-1)[chosen]
    return tokens, steps


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize(
    ("sampler", "steps", "threshold"),
    [
        (dj.Confidence(1), 3, None),
        (dj.Confidence(8, steps=2), 2, None),
        (dj.Confidence(8, threshold=0.3), 9, 0.3),
    ],
    ids=["one each", "two steps", "threshold"],
)
def test_each_sequence_is_filled_as_by_plain_passes(shift, sampler, steps, threshold):
    cfg = small_config(right_shift=shift)
    model = Model(cfg, silence(amplify(init_params(cfg), 8), MASK))
    out = dj.infill(model, SEQUENCES, sampler=sampler)
    calls = []
    for sequence, found in zip(SEQUENCES, out.tokens, strict=True):
        expected, own = filled_plainly(model, sequence, steps, threshold)
        np.testing.assert_array_equal(found[-len(sequence) :], expected)
        calls.append(own)
    assert not (out.tokens == MASK).any() and out.nfe == max(calls)
    if threshold is not None:
        np.testing.assert_array_equal(out.passes, calls)


def test_padding_is_nothing_to_fill_whatever_token_it_is(lively):
    """[MASK] is the padding of some tokenizers; given as such, it also comes back as such."""
    tokens = np.array([[MASK, 5, MASK, 7, 8], [MASK, MASK, 6, MASK, MASK]])
    valid = np.arange(5) >= np.array([[0], [2]])
    out = dj.infill(lively, tokens, valid, sampler=dj.Confidence(5, threshold=0.9), trajectory=True)
    np.testing.assert_array_equal(out.trajectory.tokens[-1], out.tokens)
    for row, start in enumerate((0, 2)):
        alone = dj.infill(
            lively, tokens[row : row + 1, start:], sampler=dj.Confidence(5, threshold=0.9)
        )
        np.testing.assert_array_equal(out.tokens[row, start:], alone.tokens[0])
        assert out.passes[row] == alone.passes[0]
        assert out.masked_share[0, row] == pytest.approx(2 / 5)
    assert (out.tokens[1, :2] == MASK).all() and np.isnan(out.log_probs[1, :2]).all()


def test_a_policy_and_the_batch_change_no_sequence(lively, routers):
    settings = {"policy": Routed(routers, 0.3), "log_probs": True}
    together = dj.infill(lively, SEQUENCES, **settings)
    assert 0 < together.gates.mean() < 1
    for i, sequence in enumerate(SEQUENCES[:1]):
        alone = dj.infill(lively, [sequence], **settings)
        np.testing.assert_array_equal(together.tokens[i, -len(sequence) :], alone.tokens[0])
        known = np.isfinite(alone.log_probs[0])
        assert known.sum() == sequence.count(MASK)  # what was given has none
        found = together.log_probs[i, -len(known) :]
        np.testing.assert_allclose(found[known], alone.log_probs[0, known], atol=2e-4)


@pytest.mark.parametrize(
    ("sequences", "sampler", "message"),
    [
        ([[5, 9, 11]], dj.Confidence(1), "sequence [0] has no [MASK] (id 63) to fill"),
        ([[5, MASK], [5]], dj.Confidence(1), "sequence [1] has no [MASK]"),
        ([], dj.Confidence(1), "there are no sequences; give at least one"),
        ([[5, MASK]], dj.Confidence(4, 2), "are one block, the most confident first; leave out"),
        ([[5, MASK]], dj.Confidence(4, cfg_scale=1.0), "cfg_scale goes by what is prompt"),
        ([[5, MASK]], dj.Confidence(4, stop_at_eos=True), "stop_at_eos goes by what is prompt"),
        ([[99, MASK]], dj.Confidence(1), "sequence 0 has token 99, outside the vocabulary"),
    ],
)
def test_what_cannot_be_filled_is_one_line(lively, sequences, sampler, message, untyped):
    with pytest.raises(InputError, match=re.escape(message)) as error:
        dj.infill(lively, sequences, sampler=sampler)
    assert "\n" not in str(error.value)


def test_a_shifted_model_needs_a_token_before_the_mask(untyped):
    cfg = small_config(right_shift=True)
    model = Model(cfg, init_params(cfg))
    with pytest.raises(InputError, match=r"sequence \[1\] begins with \[MASK\], but this model"):
        dj.infill(model, [[5, MASK, 4], [MASK, 4]])
