"""The sampler's parts, and the loop with logits that a test states."""

import dataclasses
from functools import cache, partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dials_jax.caching.cache import ForwardOutputs, ForwardVariant, Work, always
from dials_jax.caching.canvas import CanvasModel
from dials_jax.caching.plain import NoCache
from dials_jax.errors import InputError
from dials_jax.models import transformer
from dials_jax.sampling.confidence import (
    Confidence,
    confident_run,
    entropy_of,
    propose,
    ranks,
    step_quota,
    within_entropy_bound,
)
from dials_jax.sampling.dream import Dream
from dials_jax.sampling.end_of_text import fill_after_eos
from dials_jax.sampling.loop import Loop
from dials_jax.sampling.reveal import StepInfo
from tests.conftest import EOS, MASK, small_config

EOT = 2
CFG = small_config(eot_id=EOT)
VOCAB = CFG.vocab_size
P = 3  # tokens of a prompt


# ---------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize(
    "present, num_steps, expected",
    [(8, 4, [2, 2, 2, 2]), (10, 4, [3, 3, 2, 2]), (3, 5, [1, 1, 1, 0, 0]), (0, 2, [0, 0])],
)
def test_quota_is_the_floor_with_the_remainder_first(present, num_steps, expected):
    quotas = [step_quota(jnp.array([present]), jnp.array(s), num_steps) for s in range(num_steps)]
    assert [quota.item() for quota in quotas] == expected


def test_one_block_and_one_token_per_step_by_default():
    assert Confidence(8) == Confidence(gen_length=8, block_length=8, steps=8)
    assert Confidence(8, 2).steps_per_block == 2
    assert Dream(8) == Dream(max_new_tokens=8, steps=8)


def test_ranking_is_by_row_and_ties_go_to_the_left():
    confidence = np.array([[0.5, 0.9, 0.5, 0.9, 0.1], [0.1, 0.2, 0.3, 0.4, 0.5]], np.float32)
    np.testing.assert_array_equal(jax.jit(ranks)(confidence), [[2, 0, 3, 1, 4], [4, 3, 2, 1, 0]])


jitted_run = jax.jit(confident_run, static_argnums=1)


@pytest.mark.parametrize(
    "confidence, factor, expected",
    [
        # The n-th most confident passes from 1 - factor / (n + 1) on: 1/2, 2/3, 3/4, 4/5 here.
        ([0.1, 0.2, 0.6, 0.3], 1.0, [0, 0, 1, 0]),  # 0.3 < 2/3: one
        ([0.7, 0.74, 0.9, 0.1], 1.0, [0, 1, 1, 0]),  # 0.74 passes as second, 0.7 < 3/4
        ([0.8, 0.76, 0.9, 0.1], 1.0, [1, 1, 1, 0]),  # and 0.76 as third
        ([0.1, 0.1, 0.2, 0.1], 1.0, [0, 0, 1, 0]),  # the first always
        ([0.9, 0.5, 0.9, 0.85], 1.0, [1, 0, 1, 1]),  # only the last fails
        ([0.81, 0.82, 0.9, 0.85], 1.0, [1, 1, 1, 1]),
        # 2/3, 7/9, ... with factor 2/3 the second needs 7/9 = 0.778, the third 5/6 = 0.833
        ([0.80, 0.77, 0.79, 0.9], 2 / 3, [1, 0, 0, 1]),
        # A failing second stops those behind it, however low their own bound is.
        ([0.6, 0.3, 0.29, 0.28], 2.0, [1, 0, 0, 0]),
        ([-np.inf, 0.9, -np.inf, 0.8], 1.0, [0, 1, 0, 1]),  # nothing to reveal there
    ],
)
def test_the_factor_rule_by_hand(confidence, factor, expected):
    both = np.array([confidence, confidence[::-1]], np.float32)
    picked = jitted_run(both, factor)
    np.testing.assert_array_equal(picked, [expected, expected[::-1]])


@pytest.mark.parametrize(
    "entropy, bound, expected",
    [
        ([0.3, 0.1, 0.2, 5.0], 0.0, [0, 1, 0, 0]),  # the first always
        ([0.3, 0.1, 0.2, 5.0], 0.1, [0, 1, 1, 0]),  # 0.1 without the largest
        ([0.3, 0.1, 0.2, 5.0], 0.31, [1, 1, 1, 0]),
        ([0.3, 0.1, 0.2, 5.0], 0.61, [1, 1, 1, 1]),  # the largest itself is never counted
        ([np.inf, 0.2, np.inf, 0.1], 0.05, [0, 0, 0, 1]),  # nothing to reveal there
        ([0.0, 0.0, 0.0, 0.2], 0.0, [1, 1, 1, 1]),
    ],
)
def test_the_entropy_bound_by_hand(entropy, bound, expected):
    picked = within_entropy_bound(jnp.array([entropy, entropy[::-1]]), bound)
    picked &= jnp.isfinite(jnp.array([entropy, entropy[::-1]]))
    np.testing.assert_array_equal(picked, [expected, expected[::-1]])


# What the published samplers reveal of four blocks of eight tokens: d3LLM's `generate`, and
# `EntropyBoundSampler` of transformers 5 (DiffusionGemma). 300 more agreed, with masks.
PUBLISHED_CHOICES = {
    ("entropy_threshold", 0.1): ("4", "5", "256", "6"),
    ("entropy_threshold", 0.5): ("4", "457", "01234567", "6"),
    ("entropy_threshold", 1.0): ("0146", "4567", "01234567", "1456"),
    ("entropy_bound", 0.1): ("4", "57", "1256", "6"),
    ("entropy_bound", 0.5): ("4", "457", "124567", "46"),
    ("entropy_bound", 1.0): ("14", "4567", "1234567", "456"),
}


@pytest.mark.parametrize(("rule", "value"), PUBLISHED_CHOICES)
def test_entropy_rules_reveal_what_the_published_samplers_do(rule, value):
    logits = 4 * np.random.default_rng(0).normal(size=(4, 8, 12))
    confidence = -entropy_of(jnp.array(logits, jnp.float32))
    count = jnp.full(4, 8, jnp.int32)
    info, keys = StepInfo(jnp.int32(0), count, count), jax.random.split(jax.random.key(0), (4, 8))
    picked = Confidence(8, **{rule: value}).choose(confidence, info, keys)
    found = ["".join(map(str, np.flatnonzero(one))) for one in picked]
    assert tuple(found) == PUBLISHED_CHOICES[rule, value]


def test_entropies_are_in_nats_and_without_impossible_tokens():
    logits = jnp.log(jnp.array([[[0.5, 0.25, 0.25, 0.0], [1.0, 0.0, 0.0, 0.0]]]))
    np.testing.assert_allclose(entropy_of(logits), [[1.5 * np.log(2), 0.0]], rtol=1e-6)


def sampler_of(**changes):
    return Confidence(**({"gen_length": 8, "block_length": 4, "steps": 4} | changes))


@partial(jax.jit, static_argnums=0)
def proposals_of(sampler, logits, seed):
    keys = jax.random.split(jax.random.key(seed), logits.shape[:2])  # one a position
    return propose(sampler, CFG, logits, keys)


def proposals(logits, seed=0, **changes):
    return jax.device_get(proposals_of(sampler_of(**changes), logits, seed))


def one_hot(tokens):
    return np.eye(VOCAB, dtype=np.float32)[np.asarray(tokens)]


def favouring(*tokens, high=3.0):
    """Logits [1, len(tokens), V] that put `high` on one token each and 0 elsewhere."""
    return high * one_hot([tokens])


def test_confidence_is_the_probability_of_the_guess():
    guess, confidence = proposals(favouring(7, 9))
    np.testing.assert_array_equal(guess, [[7, 9]])
    np.testing.assert_allclose(confidence, np.exp(3) / (np.exp(3) + VOCAB - 1), rtol=1e-5)


def test_noise_changes_guesses_but_not_probabilities():
    logits = np.broadcast_to(favouring(7), (1, 200, VOCAB))
    guess, confidence = proposals(logits, temperature=1.0)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    chosen = np.take_along_axis(probabilities, guess[..., None], -1)[..., 0]
    np.testing.assert_allclose(confidence, chosen, rtol=1e-5)
    share = float(np.mean(guess == 7))
    p = float(probabilities[0, 0, 7])  # at temperature 1, Gumbel noise samples the softmax
    assert abs(share - p) < 4 * (p * (1 - p) / 200) ** 0.5


def test_a_small_temperature_hardly_strays():
    guess, _ = proposals(np.broadcast_to(favouring(7), (1, 200, VOCAB)), temperature=0.1)
    assert (guess == 7).all()


def test_random_remasking_draws_confidences_a_row():
    logits = np.broadcast_to(favouring(7, 8, 9), (2, 3, VOCAB))
    guess, confidence = proposals(logits, remasking="random")
    np.testing.assert_array_equal(guess, [[7, 8, 9]] * 2)
    assert len(np.unique(confidence)) == 6
    assert (confidence != proposals(logits, seed=1, remasking="random")[1]).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_flag_never_yields_end_of_text(temperature):
    logits = np.broadcast_to(favouring(EOS, high=20.0), (1, 100, VOCAB))
    assert (proposals(logits, temperature=temperature)[0] == EOS).all()
    guess, _ = proposals(logits, temperature=temperature, logits_eos_inf=True)
    assert not (guess == EOS).any()


def test_confidence_flag_at_temperature_0_suppresses_both_ends():
    flagged = {"confidence_eos_eot_inf": True}
    guess, confidence = proposals(favouring(EOS, EOT, 7), **flagged)
    np.testing.assert_array_equal(guess, [[EOS, EOT, 7]])  # guesses stay
    np.testing.assert_array_equal(confidence[0, :2], [0, 0])
    # The others share the probability of both: 7 competes with VOCAB - 3 tokens.
    np.testing.assert_allclose(confidence[0, 2], np.exp(3) / (np.exp(3) + VOCAB - 3), rtol=1e-5)


def test_confidence_flag_above_temperature_0_suppresses_end_of_turn_only():
    flagged = {"confidence_eos_eot_inf": True, "temperature": 1e-3}
    guess, confidence = proposals(favouring(EOS, EOT), **flagged)
    np.testing.assert_array_equal(guess, [[EOS, EOT]])
    np.testing.assert_allclose(confidence[0, 0], np.exp(3) / (np.exp(3) + VOCAB - 2), rtol=1e-5)
    assert confidence[0, 1] == 0


# ----------------------------------------------------------------------------------------- loop


class Stated(NoCache):
    """One kind of call, on the block: its logits are what a test says."""

    def __init__(self, logits_of):
        object.__setattr__(self, "logits_of", logits_of)

    def forward_variants(self, net, blocks):
        def forward(inputs, cache_state):
            start = blocks.start + inputs.block * blocks.length
            gates = jnp.ones((net.cfg.num_layers, net.num_sequences), bool)
            logits = self.logits_of(inputs.tokens, start, inputs.step)
            return ForwardOutputs(
                logits, net.positions(start, blocks.length), None, gates, cache_state
            )

        return [
            ForwardVariant(
                always, forward, Work((blocks.length,) * net.cfg.num_layers, blocks.length)
            )
        ]


@pytest.fixture(scope="module")
def fill():
    """Runs the loop; `logits_of(tokens, start, step)` gives logits of the block."""

    def run(logits_of, sampler, num_sequences=2, seed=0):
        @jax.jit
        def filled(canvas):
            keys = jax.random.split(jax.random.key(seed), num_sequences)
            rows = transformer.block_inputs(CFG, None, canvas.shape)
            net = CanvasModel(CFG, {}, None, "auto", rows, keys, None, P)
            loop = Loop(sampler, Stated(logits_of), net, P, keys)
            state = loop.run(loop.start(canvas, CFG.num_layers))
            return state.tokens, state.record

        canvas = np.full((num_sequences, P + sampler.gen_length), MASK)
        canvas[:, :P] = 5
        return jax.device_get(filled(canvas))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer, "head_logits", lambda cfg, params, h: h)
        yield run


def random_logits(sampler, num_sequences=2):
    def logits_of(tokens, start, step):
        key = jax.random.fold_in(jax.random.key(1), step)
        logits = jax.random.normal(key, (num_sequences, sampler.block_length, VOCAB))
        return logits.at[..., MASK].set(-jnp.inf)

    return logits_of


CASES = [
    {},
    {"temperature": 0.8},
    {"remasking": "random"},
    {"temperature": 0.8, "remasking": "random"},
    {"steps": 6},  # 3 steps for 4 tokens
    {"steps": 10},  # more steps than tokens
    {"block_length": 8, "steps": 3},
]


@pytest.fixture(scope="module")
def fill_at_random(fill):
    """The same with logits that are drawn; once per sampler."""
    return cache(lambda sampler: fill(random_logits(sampler), sampler))


@pytest.mark.parametrize("changes", CASES)
def test_the_prompt_stays_and_no_mask_is_left(fill_at_random, changes):
    sampler = sampler_of(**changes)
    tokens, record = fill_at_random(sampler)
    assert (tokens[:, :P] == 5).all()
    assert not (tokens == MASK).any()
    assert record.gates.shape == (min(sampler.steps, 8), CFG.num_layers, 2)
    assert record.nfe == min(sampler.steps, sampler.gen_length)  # a step reveals one at least


@pytest.mark.parametrize("changes", CASES)
def test_masked_shares_follow_the_quotas(fill_at_random, changes):
    # Every block has 4 masks (8 in the last case), committed by quota: the rest is what is left.
    sampler = sampler_of(**changes)
    _, record = fill_at_random(sampler)
    left, expected = 8, []
    for _ in range(sampler.num_blocks):
        size, n = sampler.block_length, sampler.steps_per_block
        for quota in [size // n + (i < size % n) for i in range(n)]:
            if quota:  # a block that is full is left at once
                expected.append(left / 8)
            left -= quota
    shares = record.masked_share[: record.nfe]
    np.testing.assert_allclose(shares, np.array([expected] * 2).T)


def test_each_block_is_finished_before_the_next_starts(fill):
    sampler = sampler_of(gen_length=12, block_length=4, steps=6)
    seen = []

    def logits_of(tokens, start, step):
        jax.debug.callback(lambda *x: seen.append(x), tokens, start, step, ordered=True)
        return random_logits(sampler)(tokens, start, step)

    fill(logits_of, sampler)
    jax.effects_barrier()
    assert [int(start) for _, start, _ in seen] == [3, 3, 7, 7, 11, 11]
    for tokens, start, _ in seen:
        assert not (tokens[:, :start] == MASK).any()  # the blocks before are done
        assert (tokens[:, start + 4 :] == MASK).all()  # those after are untouched


def test_the_most_confident_tokens_go_first(fill):
    sampler = sampler_of(gen_length=4, steps=4)
    order = []

    def logits_of(tokens, start, step):
        jax.debug.callback(lambda t: order.append(t[0, P:] != MASK), tokens, ordered=True)
        # Confidence rises with 2, 0, 3, 1; every position predicts its number plus 10.
        high = np.array([3.0, 1.0, 4.0, 2.0], np.float32)
        row = high[:, None] * one_hot(np.arange(4) + 10)
        return jnp.broadcast_to(row, (2, 4, VOCAB))

    tokens, _ = fill(logits_of, sampler)
    jax.effects_barrier()
    np.testing.assert_array_equal(tokens[:, P:], [[10, 11, 12, 13]] * 2)
    filled = [[], [2], [0, 2], [0, 2, 3]]
    assert [list(np.flatnonzero(row)) for row in order] == filled


def test_suppressed_tokens_are_committed_last(fill):
    """Confidence 0 is still above that of a token that is done."""
    sampler = sampler_of(gen_length=4, steps=4, confidence_eos_eot_inf=True)

    def logits_of(tokens, start, step):
        return jnp.broadcast_to(favouring(EOS, 7, EOS, 8, high=9.0), (2, 4, VOCAB))

    tokens, _ = fill(logits_of, sampler)
    np.testing.assert_array_equal(tokens[:, P:], [[EOS, 7, EOS, 8]] * 2)


def test_a_model_that_predicts_mask_uses_up_quota_and_leaves_masks(fill):
    """As in the reference: nothing forbids the prediction, and no later step makes up for it."""
    sampler = sampler_of(gen_length=4, steps=4)
    high = np.array([[6.0], [3.0], [3.0], [3.0]], np.float32)

    def logits_of(tokens, start, step):
        return jnp.broadcast_to(high * favouring(MASK, 7, 8, 9), (2, 4, VOCAB))

    tokens, _ = fill(logits_of, sampler)
    np.testing.assert_array_equal(tokens[:, P:], [[MASK] * 4] * 2)


@pytest.mark.parametrize(
    "changes, nfe",
    [
        # Odd places of a block are sure (0.9998), even ones are not (0.24).
        ({"threshold": 0.9}, 3),  # two at once, then one by one
        ({"threshold": 0.2}, 1),
        ({"threshold": 1.0}, 4),  # always the most confident
        ({"factor": 0.1}, 3),  # the second needs 0.967
        ({"factor": 0.0}, 4),
        # The sure ones have an entropy of 0.002 nats, the others of 3.7.
        ({"entropy_threshold": 0.01}, 3),
        ({"entropy_threshold": 0.0}, 4),
        ({"entropy_threshold": 4.0}, 1),
        ({"entropy_bound": 0.0}, 4),
        ({"entropy_bound": 0.003}, 3),  # of two the smaller one counts, of three two
        ({"entropy_bound": 3.0}, 2),  # three at once, then the last
        ({"entropy_bound": 4.0}, 1),
    ],
)
def test_parallel_rules_end_as_soon_as_a_block_is_full(fill, changes, nfe):
    sampler = sampler_of(**changes)

    def logits_of(tokens, start, step):
        return jnp.broadcast_to(UNSURE, (2, 4, VOCAB))

    tokens, record = fill(logits_of, sampler)
    np.testing.assert_array_equal(tokens[:, P:], [[7, 8, 9, 10] * 2] * 2)
    assert record.nfe == 2 * nfe


UNSURE = np.array([[3.0], [13.0], [3.0], [13.0]], np.float32) * one_hot(np.arange(7, 11))


def test_a_row_that_is_sure_waits_for_one_that_is_not(fill):
    sampler = sampler_of(gen_length=4, threshold=0.9)
    sure = 20 * one_hot(np.arange(7, 11))

    def logits_of(tokens, start, step):
        later = jnp.where(step > 0, 20, sure) * 1.0  # would change what is revealed already
        return jnp.stack([later, UNSURE])

    tokens, record = fill(logits_of, sampler)
    np.testing.assert_array_equal(tokens[:, P:], [[7, 8, 9, 10]] * 2)
    assert record.nfe == 3
    np.testing.assert_allclose(record.masked_share[:3], [[1, 1], [0, 0.5], [0, 0.25]])


# ---------------------------------------------------------------------------------- editing


def scripted(*steps, high=9.0):
    """Logits of the tokens that each step proposes, per sequence, [steps][B][W]; then the last."""
    tokens = jnp.array(steps)

    def logits_of(canvas, start, step):
        now = tokens[jnp.minimum(step, len(steps) - 1)]
        return high * jax.nn.one_hot(now, VOCAB)

    return logits_of


EDITING = {"gen_length": 4, "threshold": 0.9, "edit_threshold": 0.9}


def test_editing_follows_the_model_until_it_is_content(fill):
    sampler = sampler_of(**EDITING)
    a, b, c = [7, 8, 9, 10], [7, 20, 9, 10], [7, 20, 21, 10]
    tokens, record = fill(scripted([a, b], [b, b], [c, b]), sampler)
    np.testing.assert_array_equal(tokens[:, P:], [c, b])
    # Sequence 0 reveals, is edited twice and then left alone; 1 is left alone at once.
    assert record.nfe == 4
    np.testing.assert_array_equal(record.own[:4], [[1, 1], [1, 1], [1, 0], [1, 0]])
    assert len(record.variant) == 4 + 16  # the record has room for all steps that may come


def test_a_sequence_that_waits_is_not_edited(fill):
    sampler = sampler_of(**EDITING)
    a, b, later = [7, 8, 9, 10], [7, 20, 9, 10], [30, 31, 32, 33]
    # Sequence 1 is content after step 1, so what the model would make of it later does not count.
    tokens, _ = fill(scripted([a, a], [b, a], [a, later]), sampler)
    np.testing.assert_array_equal(tokens[:, P:], [a, a])


@pytest.mark.parametrize("steps, nfe", [(0, 1), (1, 2), (3, 4)])
def test_editing_that_never_ends_is_ended(fill, steps, nfe):
    sampler = sampler_of(**EDITING, max_edit_steps=steps)
    a, b = [7, 8, 9, 10], [11, 12, 13, 14]
    tokens, record = fill(scripted(*[[a, a], [b, b]] * 3), sampler)
    assert record.nfe == nfe
    np.testing.assert_array_equal(tokens[:, P:], [b if steps % 2 else a] * 2)


def test_tokens_are_edited_while_others_are_still_masked(fill):
    sampler = sampler_of(**EDITING, max_edit_steps=0)

    def logits_of(canvas, start, step):
        sure = jnp.asarray(favouring(7, 8, 9, 10, high=9.0))
        sure = sure.at[0, 2:].mul(jnp.where(step == 0, 0.1, 1.0))
        edited = favouring(20, 8, 9, 10, high=9.0)
        return jnp.broadcast_to(jnp.where(step == 0, sure, edited), (2, 4, VOCAB))

    tokens, record = fill(logits_of, sampler)
    np.testing.assert_array_equal(tokens[:, P:], [[20, 8, 9, 10]] * 2)
    assert record.nfe == 2


def test_only_sure_edits_are_made_and_none_to_mask(fill):
    sampler = sampler_of(**EDITING)
    a, b = favouring(7, 8, 9, 10, high=9.0), favouring(7, 20, MASK, 10, high=9.0)
    b[0, 1] *= 0.4  # 0.37

    def logits_of(canvas, start, step):
        return jnp.broadcast_to(jnp.where(step == 0, a, b), (2, 4, VOCAB))

    tokens, record = fill(logits_of, sampler)
    np.testing.assert_array_equal(tokens[:, P:], [[7, 8, 9, 10]] * 2)
    assert record.nfe == 2


def test_an_end_of_text_counts_once_its_block_is_final(fill):
    sampler = sampler_of(**EDITING | {"gen_length": 8}, stop_at_eos=True)
    early, ended = [7, EOS, 9, 10], [7, 8, EOS, 10]
    # Sequence 0 loses its first end and keeps another; 1 loses it and goes on.
    tokens, record = fill(scripted([early, early], [ended, [7, 8, 9, 10]]), sampler)
    np.testing.assert_array_equal(tokens[0, P:], [7, 8, EOS, 10] + [EOS] * 4)
    np.testing.assert_array_equal(tokens[1, P:], [7, 8, 9, 10] * 2)
    # Three steps each; then sequence 1 alone has a second block, a step and one that edits nothing.
    np.testing.assert_array_equal(record.own[: int(record.nfe)].sum(axis=0), [3, 5])


# ---------------------------------------------------------------------------------- ends of text


def order_of(fill, logits, **changes):
    """In which order a row's tokens are revealed, one a step."""
    sampler = sampler_of(gen_length=4, **changes)
    states = []

    def logits_of(tokens, start, step):
        jax.debug.callback(lambda t: states.append(t[0, P:] != MASK), tokens, ordered=True)
        return jnp.broadcast_to(logits, (1, 4, VOCAB))

    tokens, _ = fill(logits_of, sampler, num_sequences=1)
    jax.effects_barrier()
    states.append(tokens[0, P:] != MASK)
    return [int(np.flatnonzero(b & ~a)[0]) for a, b in pairwise(states)]


def test_a_delayed_end_of_text_waits_for_its_left_neighbour(fill):
    # Confidence falls from the end to the start: without delay the text ends first.
    logits = np.array([[3.0], [4.0], [5.0], [6.0]], np.float32) * one_hot([7, 8, EOS, EOS])
    assert order_of(fill, logits) == [3, 2, 1, 0]
    # With it neither end counts until token 1 is known; then one is there, and the rest is free.
    assert order_of(fill, logits, delay_eos=True) == [1, 2, 3, 0]


def test_the_first_token_of_a_block_may_end_the_text(fill):
    logits = np.array([[6.0], [5.0], [4.0], [3.0]], np.float32) * one_hot([EOS, 7, 8, 9])
    assert order_of(fill, logits, delay_eos=True) == [0, 1, 2, 3]


def test_all_after_a_known_end_is_closed():
    tokens = np.array(
        [
            [5, EOS, 5, 8, EOS, MASK, MASK],  # ends; an end of text in the prompt does not
            [5, 5, 5, MASK, EOS, MASK, MASK],  # not yet: a token before it is not known
            [5, 5, 5, EOS, 9, MASK, MASK],  # what is known stays
            [5, 5, 5, 8, 9, MASK, MASK],
        ]
    )
    expected = np.array(tokens)
    expected[0, 5:] = expected[2, 5:] = EOS
    found = jax.jit(fill_after_eos, static_argnums=(0, 2))(CFG, tokens, P)
    np.testing.assert_array_equal(found, expected)


# -------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"gen_length": 10}, "gen_length=10 must be divisible by block_length=4"),
        ({"steps": 3}, "steps=3 must be divisible by the 2 blocks"),
        ({"steps": 0}, "steps=0 must be positive"),
        ({"temperature": -1.0}, "temperature=-1.0 must not be negative"),
        ({"cfg_scale": -0.5}, "cfg_scale=-0.5 must not be negative"),
        ({"threshold": -0.1}, "threshold=-0.1 must not be negative"),
        ({"threshold": 0.9, "factor": 1.0}, "give one of them"),
        ({"entropy_bound": 0.1, "factor": 1.0}, "factor and entropy_bound are rules for the same"),
        ({"entropy_bound": -0.1}, "entropy_bound=-0.1 must not be negative"),
        ({"entropy_bound": 0.1, "delay_eos": True}, "delay_eos=True changes .* entropy_bound goes"),
        ({"entropy_threshold": 0.1, "remasking": "random"}, "remasking='random' changes"),
        (
            {"threshold": 0.9, "remasking": "random"},
            "threshold goes by confidence, .*'random' does",
        ),
        ({"factor": 1.0, "remasking": "random"}, "factor goes by confidence"),
        ({"threshold": 90.0}, "threshold=90.0 is a probability; at most 1"),
        ({"edit_threshold": 0.9}, "edit_threshold revises .* give one of threshold, factor"),
        ({"threshold": 0.9, "max_edit_steps": 2}, "max_edit_steps is for editing"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        sampler_of(**changes)


def test_settings_compile_apart():
    a = sampler_of()
    assert hash(a) == hash(sampler_of()) and a != dataclasses.replace(a, temperature=0.1)
