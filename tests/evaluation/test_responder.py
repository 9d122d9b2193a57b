"""Answers of a harness's requests: as if alone, kept as they come, never for other settings."""

import jax
import numpy as np
import pytest

from dials_jax.caching.plain import DualCache
from dials_jax.data.tokenizer import character_tokenizer
from dials_jax.errors import InputError
from dials_jax.evaluation import batched
from dials_jax.evaluation.answer_store import AnswerSettings
from dials_jax.evaluation.batched import request_hash, request_keys
from dials_jax.evaluation.likelihood import log_likelihood
from dials_jax.evaluation.responder import Responder
from dials_jax.evaluation.text_end import Stop, cut_at_stop
from dials_jax.models.model import Model
from dials_jax.sampling.confidence import Confidence
from dials_jax.sampling.generate import generate
from dials_jax.skipping.policies import Random, Static
from dials_jax.skipping.routed import Routed
from tests.conftest import MASK

PAIRS = [((3, 4, 5), (6, 7)), ((8,), (9, 10, 11)), ((3, 4, 5), (18,)), ((20, 21), (22, 23))]
PROMPTS = [(5, 6), (7,), (8, 9, 10, 11), (12, 13, 14), (15,), (2, 3)]
SAMPLER = Confidence(gen_length=4, block_length=2, steps=4, temperature=0.5)
SETTINGS = AnswerSettings(num_samples=4, batch_size=2, bucket=1, max_programs=2)


def likelihoods(responder, pairs=PAIRS, **kwargs):
    found = dict(responder.likelihoods(pairs, **kwargs))
    return [found[i] for i in range(len(pairs))]


def generations(responder, prompts=PROMPTS, sampler=SAMPLER, draws=None):
    found = dict(responder.generations(prompts, sampler, draws))
    return [found[i] for i in range(len(prompts))]


@pytest.fixture
def computed(monkeypatch):
    """The numbers of sequences that the model scored or continued, batch by batch."""
    sizes = []

    def counting(name, size):
        real = getattr(batched, name)

        def wrapper(model, *args, **kwargs):
            sizes.append(size(args))
            return real(model, *args, **kwargs)

        monkeypatch.setattr(batched, name, wrapper)

    counting("score_pairs", lambda args: len(args[2]))
    counting("generate", lambda args: len(args[0]))
    return sizes


# ------------------------------------------------------------------------------ what an answer is


def test_likelihoods_are_those_of_each_pair_alone(lively):
    found = likelihoods(Responder(lively, settings=SETTINGS))
    for (prompt, answer), one in zip(PAIRS, found, strict=True):
        key = request_keys(0, [request_hash(prompt)])
        assert one.log_likelihood == pytest.approx(
            log_likelihood(lively, prompt, answer, 4, 4, key=key), rel=1e-4
        )


def test_an_answer_is_greedy_if_one_pass_over_a_masked_answer_predicts_it(lively):
    """Whatever its random copies look like."""
    pairs = []
    for prompt, answer in PAIRS:
        canvas = np.array([[*prompt, *[lively.config.mask_id] * len(answer)]])
        best = np.asarray(lively.apply(canvas).logits)[0, len(prompt) :].argmax(axis=-1)
        pairs += [(prompt, tuple(best.tolist())), (prompt, (*best[:-1].tolist(), 24))]
    for seed in range(4):  # the random copy comes first, in a batch of its own
        settings = AnswerSettings(num_samples=1, batch_size=1, bucket=4, seed=seed)
        found = likelihoods(Responder(lively, settings=settings), pairs)
        assert [one.is_greedy for one in found] == [True, False] * 4


def test_texts_are_those_of_each_prompt_alone(lively):
    found = generations(Responder(lively, Random(1), SETTINGS))
    for prompt, ids in list(zip(PROMPTS, found, strict=True))[1:3]:
        key = request_keys(0, [request_hash(prompt)])
        alone = generate(
            lively, np.array([prompt]), sampler=SAMPLER, policy=Random(1), key=key, fill_to=2
        )
        assert alone.tokens[0, len(prompt) :].tolist() == ids


def test_order_and_batches_change_no_answer(lively):
    one = Responder(lively, settings=SETTINGS)
    other = Responder(lively, settings=AnswerSettings(num_samples=4, batch_size=3, bucket=4))
    texts, values = generations(one), likelihoods(one)
    assert generations(other, PROMPTS[::-1])[::-1] == texts
    for a, b in zip(likelihoods(other, PAIRS[::-1])[::-1], values, strict=True):
        assert a.log_likelihood == pytest.approx(b.log_likelihood, rel=1e-4)
        assert a.is_greedy == b.is_greedy


def test_draws_of_one_prompt_differ_and_equal_requests_are_answered_once(lively, computed):
    responder = Responder(lively, settings=SETTINGS)
    prompts, draws = [PROMPTS[0]] * 4, [0, 1, 2, 0]
    first, second, third, again = generations(responder, prompts, draws=draws)
    assert first == again and len({tuple(first), tuple(second), tuple(third)}) > 1
    assert sum(computed) == 3


def test_masks_depend_on_the_prompt_or_on_the_answer_too(lively):
    """Choices are compared under the same masks; texts without a context are not."""
    pairs = [((3, 4), (5, 6, 7)), ((3, 4), (5, 6, 8))]
    alone = [request_keys(0, [request_hash(pair)]) for pair in pairs]
    found = likelihoods(Responder(lively, settings=SETTINGS), pairs, key_of_answer=True)
    for (prompt, answer), key, one in zip(pairs, alone, found, strict=True):
        expected = log_likelihood(lively, prompt, answer, 4, 4, key=key)
        assert one.log_likelihood == pytest.approx(expected, rel=1e-4)


def test_a_stop_string_saves_steps_and_changes_no_text(lively):
    text = character_tokenizer("".join(map(chr, range(48, 48 + 60))))
    sampler = Confidence(gen_length=16, block_length=2, steps=16, stop_at_eos=True)
    whole = Responder(lively, settings=SETTINGS)
    plain = [text.decode(ids) for ids in generations(whole, sampler=sampler)]
    until = (plain[1][2:4], plain[3][5])
    stop, cut = Stop(until, text), Responder(lively, settings=SETTINGS)
    found = dict(cut.generations(PROMPTS, sampler, stop=stop))
    assert [cut_at_stop(text.decode(found[i]), until) for i in range(len(PROMPTS))] == [
        cut_at_stop(one, until) for one in plain
    ]
    few, all_ = (one.costs["generation"][0].num_passes for one in (cut, whole))
    assert few < all_ - 12  # the second text has eight blocks, of which two are written


def test_other_stop_strings_reuse_no_text(lively, tmp_path, computed):
    text = character_tokenizer("".join(map(chr, range(48, 48 + 60))))
    early = Confidence(gen_length=4, block_length=2, steps=4, stop_at_eos=True)
    responder = Responder(lively, settings=SETTINGS, folder=tmp_path)
    for until in (("a", "b"), ("b", "a"), ("a",), ()):
        dict(responder.generations(PROMPTS[:1], early, stop=Stop(until, text)))
    assert len(list(tmp_path.iterdir())) == 3  # their order is no matter
    for until in ((), ("a",)):  # a sampler that takes all steps: the texts hold all tokens
        dict(responder.generations(PROMPTS[:1], SAMPLER, stop=Stop(until, text)))
    assert len(list(tmp_path.iterdir())) == 4 and sum(computed) == 1


# --------------------------------------------------------------------------------- what is kept


def test_a_killed_call_continues_with_identical_answers(lively, tmp_path, computed):
    whole = Responder(lively, settings=SETTINGS)
    whole.say = (said := []).append
    expected = likelihoods(whole), generations(whole)
    total = sum(computed)
    tokens = [line.partition(" FLOPs")[0].rpartition(",")[0] for line in said]
    assert tokens == ["likelihood: 29 tokens", f"generation: {4 * len(PROMPTS)} tokens"]
    computed.clear()
    for _ in range(12):  # each process is killed after its first answer
        responder = Responder(lively, settings=SETTINGS, folder=tmp_path)
        for kind in (responder.likelihoods(PAIRS), responder.generations(PROMPTS, SAMPLER)):
            next(kind)
            kind.close()
    for file in tmp_path.glob("*/runs.jsonl"):  # and one while it was writing
        file.write_bytes(file.read_bytes() + b'{"scores": [["')
    said.clear()
    responder = Responder(lively, settings=SETTINGS, folder=tmp_path, say=said.append)
    assert (likelihoods(responder), generations(responder)) == expected
    assert [line.split()[1] for line in said] == ["21", "16"]  # tokens of what was left
    assert sum(computed) == total  # nothing was computed twice
    for kind, parts in responder.costs.items():
        assert parts[0].num_passes == whole.costs[kind][0].num_passes


def test_other_requests_use_the_answers_that_they_share(lively, tmp_path, computed):
    first = likelihoods(Responder(lively, settings=SETTINGS, folder=tmp_path), PAIRS[:3])
    computed.clear()
    found = likelihoods(Responder(lively, settings=SETTINGS, folder=tmp_path), PAIRS[1:])
    assert found[:2] == first[1:] and sum(computed) == 5  # four copies, and a whole one


OTHERS = {
    "policy": {"policy": Static((1,))},
    "num_samples": {"settings": AnswerSettings(num_samples=2, batch_size=2, bucket=1)},
    "cfg_scale": {"settings": AnswerSettings(num_samples=4, cfg_scale=1.0, batch_size=2, bucket=1)},
    "seed": {"settings": AnswerSettings(num_samples=4, seed=1, batch_size=2, bucket=1)},
}


@pytest.mark.parametrize("changed", OTHERS)
def test_another_setting_reuses_no_likelihood(lively, tmp_path, computed, changed):
    pairs = PAIRS[:1]
    likelihoods(Responder(lively, settings=SETTINGS, folder=tmp_path), pairs)
    computed.clear()
    other = {"settings": SETTINGS} | OTHERS[changed]
    likelihoods(Responder(lively, **other, folder=tmp_path), pairs)
    assert sum(computed) > 0


def test_another_sampler_cache_model_or_router_reuses_no_text(lively, routers, tmp_path, computed):
    other_routers = jax.tree.map(lambda x: x + 0, routers)
    other_routers = {**other_routers, "vote_bias": routers["vote_bias"] + 1}
    params = lively.params | {"head": {"kernel": lively.params["head"]["kernel"] * 2}}
    cached = AnswerSettings(num_samples=4, batch_size=2, bucket=1, cache=DualCache())
    calls = [
        (Responder(lively, None, SETTINGS, tmp_path), SAMPLER),
        (Responder(lively, None, SETTINGS, tmp_path), Confidence(gen_length=4)),
        (Responder(lively, None, cached, tmp_path), SAMPLER),
        (Responder(Model(lively.config, params), None, SETTINGS, tmp_path), SAMPLER),
        (Responder(lively, Routed(routers), SETTINGS, tmp_path), SAMPLER),
        (Responder(lively, Routed(routers, 0.2), SETTINGS, tmp_path), SAMPLER),
        (Responder(lively, Routed(other_routers), SETTINGS, tmp_path), SAMPLER),
    ]
    for number, (responder, sampler) in enumerate(calls, start=1):
        generations(responder, PROMPTS[:1], sampler)
        assert len(computed) == number
    for responder, sampler in calls:
        generations(responder, PROMPTS[:1], sampler)
    assert len(computed) == len(calls)


def test_batching_is_no_setting_of_an_answer(lively, tmp_path, computed):
    first = generations(Responder(lively, settings=SETTINGS, folder=tmp_path))
    computed.clear()
    settings = AnswerSettings(num_samples=4, batch_size=5, bucket=8, max_programs=1)
    assert generations(Responder(lively, settings=settings, folder=tmp_path)) == first
    assert computed == []


def test_costs_say_what_ran(lively):
    responder = Responder(lively, Static((1, 2)), SETTINGS)
    generations(responder, PROMPTS + PROMPTS[:1])
    likelihoods(responder)
    (text,), (scored,) = responder.costs["generation"], responder.costs["likelihood"]
    assert text.num_requests == 6 and text.num_passes == 6 * 4
    assert text.flops.layers_run == scored.flops.layers_run == 0.5
    assert scored.num_passes == 3 * (4 + 1) + 1  # an answer of one token needs one pass


# ---------------------------------------------------------------------------------- what is refused


def test_a_prompt_that_is_too_long_is_refused_or_cut_and_counted(lively):
    long = tuple(range(2, 62))
    with pytest.raises(InputError, match=r"pair 1: 60 tokens of the prompt, and room for 59"):
        likelihoods(Responder(lively, settings=SETTINGS), [PAIRS[0], (long, (5,) * 5)])
    with pytest.raises(InputError, match=r"prompt 0: 61 tokens.*too_long=cut"):
        generations(Responder(lively, settings=SETTINGS), [(9, *long)])
    cut = Responder(lively, settings=AnswerSettings(num_samples=4, batch_size=2, too_long="cut"))
    assert generations(cut, [(9, *long)]) == generations(cut, [long])
    assert cut.num_cut == 1
    with pytest.raises(InputError, match="and room for 0"):  # nothing of the prompt would be left
        likelihoods(cut, [((3,), (5,) * 64)])


def test_a_bad_request_is_named_by_its_place_among_all(lively, computed):
    """Equal requests are answered once, which changes no number in a message."""
    responder = Responder(lively, settings=SETTINGS)
    with pytest.raises(InputError, match=r"prompt 2 contains \[MASK\]"):
        generations(responder, [(5, 6), (5, 6), (MASK,)])
    with pytest.raises(InputError, match=r"pair 2 contains \[MASK\]"):
        likelihoods(responder, [((5, 6), (7,)), ((5, 6), (7,)), ((5,), (MASK,))])
    assert not computed


def test_settings_are_checked(untyped):
    with pytest.raises(InputError, match="num_samples=20 must be a multiple of 16"):
        AnswerSettings(num_samples=20)
    with pytest.raises(InputError, match=r"too_long='cat' is not known; did you mean 'cut'"):
        AnswerSettings(too_long="cat")
