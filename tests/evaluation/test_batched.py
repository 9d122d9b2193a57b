"""Requests of mixed lengths, without any task: order, batches and what remains change no result."""

import dataclasses

import jax
import numpy as np
import pytest

from dials_jax.caching.plain import DualCache
from dials_jax.errors import InputError
from dials_jax.evaluation import likelihood
from dials_jax.evaluation.batched import (
    generate_all,
    generation_batches,
    likelihood_batches,
    log_likelihoods,
    request_hash,
    request_keys,
)
from dials_jax.evaluation.likelihood import log_likelihood
from dials_jax.models.model import Model
from dials_jax.sampling import generate as generating
from dials_jax.sampling.confidence import Confidence
from dials_jax.sampling.generate import generate
from dials_jax.skipping.policies import Random
from tests.conftest import MASK

PROMPTS = [[5, 6], [7], [8, 9, 10, 11], [12, 13, 14], [15], [2, 3]]
PAIRS = [((3, 4, 5), (6, 7)), ((8,), (9, 10, 11)), ((3, 4, 5), (18,)), ((20, 21), (22, 23))]
SAMPLER = Confidence(gen_length=4, block_length=2, steps=4, temperature=0.5)
FEW = {"batch_size": 2, "bucket": 1, "max_programs": 2}


def test_every_prompt_gets_its_own_answer(lively):
    answers = generate_all(lively, PROMPTS, sampler=SAMPLER, policy=Random(1), **FEW)
    assert len({tuple(answer) for answer in answers.tolist()}) > 3
    for prompt, answer in list(zip(PROMPTS, answers, strict=True))[1:3]:
        key = request_keys(0, [request_hash(tuple(prompt))])
        alone = generate(
            lively, np.array([prompt]), sampler=SAMPLER, policy=Random(1), key=key, fill_to=2
        )
        np.testing.assert_array_equal(alone.tokens[0, len(prompt) :], answer)
    backwards = generate_all(lively, PROMPTS[::-1], sampler=SAMPLER, policy=Random(1), **FEW)
    np.testing.assert_array_equal(backwards[::-1], answers)


def test_generation_goes_on_with_what_is_left(lively):
    whole = generate_all(lively, PROMPTS, sampler=SAMPLER, **FEW)
    first = next(generation_batches(lively, PROMPTS, sampler=SAMPLER, **FEW))
    assert len(first.requests) == 2 and first.out.nfe == 4
    found = dict(zip(first.requests, first.answers, strict=True))
    remaining = [i for i in range(len(PROMPTS)) if i not in found]
    for batch in generation_batches(lively, PROMPTS, sampler=SAMPLER, remaining=remaining, **FEW):
        assert not found.keys() & set(batch.requests)
        found |= dict(zip(batch.requests, batch.answers, strict=True))
    np.testing.assert_array_equal([found[i] for i in range(len(PROMPTS))], whole)


@pytest.mark.parametrize("refill", [None, True])
def test_sequences_make_room_for_others(lively, refill):
    """By themselves where they may end early, and where the caller asks for it."""
    sampler = dataclasses.replace(SAMPLER, stop_at_eos=refill is None)
    settings = FEW | {"sampler": sampler, "policy": Random(1)}
    plain = generate_all(lively, PROMPTS, refill=False, **settings)
    batches = list(generation_batches(lively, PROMPTS, refill=refill, **settings))
    assert all(len(batch.requests) == 1 for batch in batches)
    found = {batch.requests[0]: batch.answers[0] for batch in batches}
    np.testing.assert_array_equal([found[i] for i in range(len(PROMPTS))], plain)
    rest = list(generation_batches(lively, PROMPTS, refill=refill, remaining=[4, 1], **settings))
    assert sorted(batch.requests[0] for batch in rest) == [1, 4]
    for batch in rest:
        np.testing.assert_array_equal(batch.answers[0], plain[batch.requests[0]])


def test_every_pair_gets_its_own_likelihood(lively):
    values = log_likelihoods(lively, PAIRS, num_samples=4, **FEW)
    for (prompt, answer), value in zip(PAIRS, values, strict=True):
        key = request_keys(0, [request_hash(prompt)])
        alone = log_likelihood(lively, prompt, answer, 4, 4, key=key)
        assert value == pytest.approx(alone, rel=1e-4)
    backwards = log_likelihoods(lively, PAIRS[::-1], num_samples=4, **(FEW | {"batch_size": 3}))
    np.testing.assert_allclose(backwards[::-1], values, rtol=1e-4)


def test_likelihoods_go_on_with_what_is_left(lively):
    whole = list(likelihood_batches(lively, PAIRS, num_samples=4, **FEW))
    numbers, copies = (
        np.concatenate([getattr(b, x) for b in whole]) for x in ("requests", "copies")
    )
    assert sorted(zip(numbers, copies, strict=True)) == [
        (pair, copy) for pair in range(4) for copy in range(1 if pair == 2 else 4)
    ]  # an answer of one token is masked in every copy
    order = np.argsort(numbers[3:], kind="stable")
    remaining = numbers[3:][order], copies[3:][order]
    rest = list(likelihood_batches(lively, PAIRS, num_samples=4, remaining=remaining, **FEW))
    values = [
        {
            (i, c): float(x)
            for b in batches
            for i, c, x in zip(b.requests, b.copies, b.scores.log_likelihood, strict=True)
        }
        for batches in (whole, rest)
    ]
    assert len(values[1]) == len(values[0]) - 3
    for name, value in values[1].items():
        assert value == pytest.approx(values[0][name], rel=1e-4)


def test_prompts_of_one_bucket_share_a_program(lively, traced_once):
    """Whatever their lengths, and how many are in the last batch or remain."""
    traced_once(generating, "generate_program")
    prompts = [[5], [6, 7], [8, 9, 10], [11, 12, 13, 14], [15, 16, 17]]
    settings = {"sampler": SAMPLER, "batch_size": 2, "bucket": 4}
    answers = generate_all(lively, prompts, **settings)
    [last] = generation_batches(lively, prompts, remaining=[3], **settings)
    np.testing.assert_array_equal(last.answers, answers[[3]])


def test_pairs_of_one_bucket_share_a_program(lively, traced_once):
    traced_once(likelihood, "score_pairs_program")
    settings = {"num_samples": 4, "batch_size": 3, "bucket": 8}
    assert len(list(likelihood_batches(lively, PAIRS, **settings))) == 5  # the last is of one copy
    [last] = likelihood_batches(lively, PAIRS, remaining=([1], [2]), **settings)
    assert last.scores.log_likelihood.shape == (1,)


def test_no_requests_have_no_results(lively):
    assert generate_all(lively, [], sampler=SAMPLER).shape == (0, 4)
    assert log_likelihoods(lively, []).shape == (0,)


@pytest.mark.parametrize(
    "ids, message",
    [([MASK], r"contains \[MASK\]"), ([5, 99], "has token 99, outside"), ([], "is empty")],
)
@pytest.mark.parametrize("sampler", [SAMPLER, Confidence(4, 4, threshold=0.5, stop_at_eos=True)])
def test_a_bad_prompt_is_named_before_the_first_batch(lively, sampler, ids, message):
    """Its batch would be the last one: the longest prompts come first."""
    cfg = dataclasses.replace(lively.config, right_shift=True)
    model = Model(cfg, lively.params)
    prompts = [[5, 6, 7, 8]] * 4 + [ids, [3]]
    batches = generation_batches(
        model, prompts, sampler=sampler, cache=DualCache(), batch_size=2, bucket=2
    )
    with pytest.raises(InputError, match=f"prompt 4 {message}"):
        next(batches)


def test_prompts_that_are_not_asked_for_may_be_anything(lively):
    settings = {"sampler": SAMPLER, "remaining": [0], "batch_size": 2}
    [batch] = generation_batches(lively, [[5, 6], [MASK]], **settings)
    assert batch.requests == [0]


def test_the_longest_prompt_is_named(lively):
    prompts = [[5], [5] * (lively.config.max_length - 3)]
    with pytest.raises(InputError, match="prompt 1 is the longest"):
        next(generation_batches(lively, prompts, sampler=SAMPLER, bucket=1))


@pytest.mark.parametrize(
    "answer, message",
    [([MASK], r" contains \[MASK\]"), ([99], " has token 99"), ([], ": the answer is empty")],
)
def test_a_bad_pair_is_named_before_the_first_batch(lively, answer, message):
    pairs = [([5, 6, 7], [8, 9])] * 4 + [([5], answer)]
    with pytest.raises(InputError, match=f"pair 4{message}"):
        next(likelihood_batches(lively, pairs, num_samples=4, batch_size=4, bucket=1))


def test_what_cannot_be_scored_is_refused(lively):
    with pytest.raises(InputError, match="num_samples=20 must be a multiple of 16"):
        log_likelihoods(lively, PAIRS, num_samples=20)
    nan = jax.tree.map(lambda x: x.at[0].set(np.nan), lively.params["head"])
    with pytest.raises(InputError, match="a likelihood is NaN; look for NaN"):
        log_likelihoods(Model(lively.config, lively.params | {"head": nan}), PAIRS, num_samples=1)
