"""Scores on items of a tokenizer of digits, with models that are random or know nothing."""

import dataclasses
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dials_jax import trees
from dials_jax.caching.plain import DualCache
from dials_jax.config import ArithmeticData, EvalTask
from dials_jax.data.arithmetic import ArithmeticTask
from dials_jax.errors import InputError
from dials_jax.evaluation import batched, likelihood, outputs
from dials_jax.evaluation.items import load_items, make_item
from dials_jax.evaluation.likelihood import log_likelihood
from dials_jax.evaluation.scoring import count_sequences, item_keys, score_task
from dials_jax.evaluation.tally import Tally
from dials_jax.evaluation.task_setup import check_task, generation_facts
from dials_jax.evaluation.text_end import cut_tokens
from dials_jax.files import finite
from dials_jax.models.model import Model
from dials_jax.sampling import generate as generating
from dials_jax.sampling.confidence import Confidence
from dials_jax.sampling.dream import Dream
from dials_jax.skipping.policies import Random, Static
from tests.conftest import amplify, init_params, silence, small_config

DATA = ArithmeticData(digits=1)
TOKENIZER = ArithmeticTask(DATA).tokenizer
GENERATION = EvalTask(name="sums", metric="exact_match", data=DATA, limit=5)
CHOICE = EvalTask(name="choice", metric="choice", data=DATA, num_samples=2)
NELBO = EvalTask(name="nelbo", metric="nelbo", data=DATA, num_samples=4)


@pytest.fixture(scope="module")
def scorer():
    """A random model over the tokenizer's vocabulary, made sure of its guesses."""
    names = ("mask", "eos", "pad")
    ids = {f"{name}_id": TOKENIZER.token_to_id(f"[{name.upper()}]") for name in names}
    cfg = small_config(vocab_size=TOKENIZER.vocab_size, num_layers=2, **ids)
    params = silence(init_params(cfg), cfg.mask_id, cfg.pad_id, cfg.eos_id)
    return Model(cfg, {**params, "head": {"kernel": 60 * params["head"]["kernel"]}})


@pytest.fixture(scope="module")
def excited(scorer):
    """The same with weights so large that what it says depends on the prompt."""
    params = amplify(scorer.params, 8)
    return Model(scorer.config, {**params, "head": scorer.params["head"]})


@pytest.fixture(scope="module")
def uniform(scorer):
    head = jax.tree.map(np.zeros_like, scorer.params["head"])
    return Model(scorer.config, {**scorer.params, "head": head})


@pytest.fixture(scope="module")
def items(scorer):
    return load_items(GENERATION, TOKENIZER, scorer.config)


@pytest.fixture(scope="module")
def choices():
    """Three prompts; answers of 2 tokens and of 1, the second being right."""
    prompts = [TOKENIZER.encode(text) for text in ("1", "2", "3")]
    answers = [TOKENIZER.encode(text) for text in ("56", "8")]
    return [make_item(prompt, answers, label=1) for prompt in prompts]


def run(model, task, items, batch_size=4, policy=None, seed=0, **kwargs):
    return score_task(model, task, items, TOKENIZER, policy, batch_size, seed, **kwargs)


def assert_equal_scores(a, b):
    assert a.keys() == b.keys()
    np.testing.assert_allclose([a[k] for k in a], [b[k] for k in a], rtol=1e-5)


# ----------------------------------------------------------------------------------- exact match


def test_exact_match_compares_what_was_generated(scorer, items):
    first = run(scorer, GENERATION, items)
    texts = {e["prompt"]: e["output"] for e in first.examples}
    assert len(texts) == 5 and all(texts.values())
    references = [texts[TOKENIZER.decode(item.prompt)] for item in items[:3]] + ["?", "?"]
    right = [
        dataclasses.replace(item, reference=reference)
        for item, reference in zip(items, references, strict=True)
    ]
    second = run(scorer, GENERATION, right)
    assert [second.items[str(item.key)] for item in items] == [1, 1, 1, 0, 0]
    assert [e["correct"] for e in second.examples].count(True) == 3


def test_text_after_the_end_does_not_count(scorer, items):
    cfg = scorer.config
    bias = np.where(np.arange(cfg.vocab_size) == cfg.eos_id, np.float32(1e4), 0)
    silent = Model(
        dataclasses.replace(cfg, head_bias=True),
        jax.tree.map(
            np.zeros_like,
            init_params(dataclasses.replace(cfg, head_bias=True)),
        )
        | {"head": {"kernel": np.zeros((32, cfg.vocab_size), np.float32), "bias": bias}},
    )
    empty = [dataclasses.replace(item, reference="") for item in items]
    assert set(run(silent, GENERATION, empty).items.values()) == {1.0}
    assert {e["output"] for e in run(silent, GENERATION, items).examples} == {""}


def score_output(task, text, reference, cfg, tail=()):
    row = cut_tokens([*TOKENIZER.encode(text), *tail], (cfg.eos_id, cfg.eot_id))
    scored = outputs.score_output(task, make_item((), [()], reference=reference), row, TOKENIZER)
    return scored.text, scored.score == 1


def test_a_stop_string_ends_a_text_whether_it_is_decoded_or_not(scorer):
    cfg = scorer.config
    task = dataclasses.replace(GENERATION, extract=r"\d+", match="last")
    assert score_output(task, "12=3", "12", cfg) == ("12=3", False)
    stops = dataclasses.replace(task, until=("7", "=3"))
    assert score_output(stops, "12=3", "12", cfg) == ("12=3", True)
    token = dataclasses.replace(task, until=("[PAD]",))  # special tokens are not decoded
    rest = [cfg.pad_id, *TOKENIZER.encode("34")]
    assert score_output(token, "12", "12", cfg, rest) == ("12", True)
    assert score_output(task, "12", "12", cfg, rest) == ("1234", False)


DREAM = {"alg": "maskgit_plus", "temperature": 0.1, "top_p": 0.95}


def test_a_task_may_take_dreams_sampler(scorer, items, monkeypatch):
    asked, generate = [], batched.generate

    def spy(*args, **kwargs):
        asked.append(kwargs["sampler"])
        return generate(*args, **kwargs)

    monkeypatch.setattr(batched, "generate", spy)
    sampler = Dream(6, 3, **DREAM)
    out = run(scorer, dataclasses.replace(GENERATION, sampler=sampler), items, batch_size=5)
    assert asked == [sampler]
    assert out.layer_counts.calls.sum() == 5 * 3
    assert all(len(example["output"]) <= 6 for example in out.examples)
    slow = dataclasses.replace(GENERATION, sampler=Dream(6, 12, **DREAM))
    out = run(scorer, slow, items, batch_size=5)
    assert out.layer_counts.calls.sum() == 5 * 12  # also steps that reveal nothing


def test_results_say_how_texts_are_generated(mixed):
    task = dataclasses.replace(GENERATION, sampler=Dream(4, 3, **DREAM))
    assert generation_facts(task, mixed) == {
        **DREAM, "sampler": "dream", "max_new_tokens": 4, "steps": 3, "top_k": None,
        "alg_temp": None, "eps": 1e-3, "cache": "none", "until": [],
    }  # fmt: skip
    sampler = Confidence(4, 2, stop_at_eos=True)
    task = dataclasses.replace(FIRST, sampler=sampler, cache=DualCache(), until=("Q:",))
    facts = generation_facts(task, mixed)
    assert facts["sampler"] == "confidence" and facts["temperature"] == 0.0
    assert (facts["gen_length"], facts["block_length"], facts["steps"]) == (4, 2, 4)
    assert facts["cache"] == "dual" and facts["until"] == ["Q:"] and facts["stop_at_eos"]
    assert generation_facts(NELBO, mixed) == {}


def test_a_dream_model_under_lladas_rules_is_said(scorer, mixed):
    model = Model(dataclasses.replace(scorer.config, model_type="dream"), scorer.params)
    with pytest.warns(UserWarning, match="this Dream model is sampled by LLaDA's rules, at temp"):
        check_task(GENERATION, mixed, model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_task(dataclasses.replace(GENERATION, sampler=Dream(4)), mixed, model)
        check_task(GENERATION, mixed, scorer)


def test_order_and_batches_change_no_exact_match(scorer, items):
    whole = run(scorer, GENERATION, items, batch_size=2, policy=Random(1))
    parts = run(scorer, GENERATION, items[::-1], batch_size=1, policy=Random(1))
    assert parts.items == whole.items
    assert parts.layer_counts.to_dict() == whole.layer_counts.to_dict()
    texts = [sorted(e["output"] for e in scores.examples) for scores in (whole, parts)]
    assert texts[0] == texts[1]


MIXED = ("1", "23", "456", "7", "18", "249", "0", "35", "1111111", "2222222")
FIRST = dataclasses.replace(GENERATION, sampler=Confidence(4, 2))


@pytest.fixture(scope="module")
def mixed():
    """Prompts of lengths from 1 to 7, and four tokens to generate."""
    return [make_item(TOKENIZER.encode(text), [(2, 3, 4, 5)], reference="?") for text in MIXED]


def generated(model, task, items, **kwargs):
    """The scores, and what was generated for each item."""
    records = []
    scores = run(model, task, items, on_record=records.append, **kwargs)
    return scores, {name: row for record in records for name, row in record["outputs"].items()}


def test_the_tasks_settings_reach_generation(scorer, mixed, monkeypatch):
    asked = {}

    def spy(*args, **kwargs):
        asked.update(kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(batched, "generate", spy)
    choice = {"cfg_scale": 0.5, "threshold": 0.7, "delay_eos": True, "stop_at_eos": True}
    choice |= {"temperature": 0.3}
    task = dataclasses.replace(FIRST, sampler=Confidence(4, 2, 2, **choice), cache=DualCache())
    with pytest.raises(KeyboardInterrupt):
        run(scorer, task, mixed)
    assert asked["sampler"] == Confidence(4, 2, 2, **choice)
    assert asked["cache"] == DualCache()
    with pytest.raises(KeyboardInterrupt):
        run(scorer, GENERATION, mixed)
    assert asked["sampler"] == Confidence(4, 4, 4) and asked["cache"] is None


def test_neither_batch_nor_bucket_changes_what_a_threshold_generates(excited, mixed):
    sampler, sizes = Confidence(4, 2, threshold=0.8), {"bucket": 1, "max_programs": 1}
    task = dataclasses.replace(FIRST, sampler=sampler, cache=DualCache(), **sizes)
    whole, rows = generated(excited, task, mixed, batch_size=5)
    assert len(set(map(tuple, rows.values()))) > 5
    task = dataclasses.replace(task, max_programs=2)
    parts, others = generated(excited, task, mixed[::-1], batch_size=1)
    assert others == rows
    # Batches take different numbers of calls; rows that wait for others count in none of them.
    assert parts.layer_counts.to_dict() == whole.layer_counts.to_dict()
    assert 10 * 2 < whole.layer_counts.calls.sum() < 10 * 4
    assert whole.flops.layers_run == 1 and whole.flops.model < 1
    assert parts.passes == whole.passes and len(whole.passes) == len(mixed)
    passes, tokens = np.array(list(whole.passes.values())).T
    assert parts.num_calls == passes.sum() > whole.num_calls  # alone, all calls are one's own
    assert len(set(passes)) > 1 and (tokens == 4).all()  # none of them ends


def test_a_shifted_model_generates_from_the_prompts_last_token(scorer):
    """Its layers do nothing and its head says which digit follows: 0 after 9 after 8, and so on."""
    cfg = dataclasses.replace(scorer.config, right_shift=True)
    digits = np.array([TOKENIZER.encode(str(digit))[0] for digit in range(10)])
    params = jax.tree.map(jnp.zeros_like, scorer.params)
    params = trees.map_named(lambda name, x: jnp.ones_like(x) if "norm" in name else x, params)
    embed = params["embed"]["table"].at[digits, np.arange(10)].set(1.0)
    head = params["head"]["kernel"].at[np.arange(10), np.roll(digits, -1)].set(2.0)
    model = Model(cfg, params | {"embed": {"table": embed}, "head": {"kernel": head}})
    items = [
        make_item(TOKENIZER.encode(text), [(2, 3, 4, 5)], reference=answer)
        for text, answer in (("1", "2345"), ("298", "9012"))
    ]
    for cache in (None, DualCache()):
        task = dataclasses.replace(GENERATION, cache=cache)
        assert set(run(model, task, items).items.values()) == {1.0}


@pytest.mark.parametrize("max_programs", [1, 3])
def test_mixed_lengths_compile_few_programs(max_programs, scorer, mixed):
    sampler = Confidence(4, 2, cfg_scale=max_programs / 2)
    task = dataclasses.replace(FIRST, bucket=1, max_programs=max_programs, sampler=sampler)
    before = generating.generate_program.num_programs
    run(scorer, task, mixed, batch_size=2)  # batches with and without padding in each bucket
    assert generating.generate_program.num_programs - before == max_programs


# ------------------------------------------------------------------------------------ likelihood


def test_nelbo_is_nats_per_token(scorer, uniform, items):
    found = run(uniform, NELBO, items)
    np.testing.assert_allclose(list(found.items.values()), np.log(TOKENIZER.vocab_size), rtol=1e-5)
    item, seed = items[2], 3
    value = log_likelihood(scorer, item.prompt, item.answers[0], 4, 4, key=item_keys(seed, [item]))
    expected = -value / len(item.answers[0])
    found = run(scorer, NELBO, items, seed=seed)
    assert found.items[str(item.key)] == pytest.approx(expected, rel=1e-4)


def test_order_and_batches_change_no_likelihood(scorer, items):
    whole = run(scorer, NELBO, items, batch_size=1, policy=Random(1))
    parts = run(scorer, NELBO, items[::-1], batch_size=3, policy=Random(1))
    assert_equal_scores(whole.items, parts.items)
    assert parts.layer_counts.to_dict() == whole.layer_counts.to_dict()


def test_mixed_pairs_take_few_programs_and_score_the_same(scorer, mixed):
    pairs = [
        dataclasses.replace(item, answers=((2, 3, 4, 5, 6)[: 1 + i % 5],))
        for i, item in enumerate(mixed[:7])
    ]
    found = []
    for max_programs in (1, 4):
        task = dataclasses.replace(NELBO, num_samples=2, bucket=1, max_programs=max_programs)
        before = likelihood.score_pairs_program.num_programs
        found.append(run(scorer, task, pairs, batch_size=6))
        assert 1 <= likelihood.score_pairs_program.num_programs - before <= max_programs
    assert_equal_scores(found[0].items, found[1].items)


def test_the_most_likely_choice_is_chosen(scorer, uniform, choices):
    # All tokens alike: the shortest answer wins in all, and by the token the first of equals.
    found = run(uniform, CHOICE, choices)
    assert set(found.items.values()) == {1.0} and len(found.items) == 3
    assert found.other_metrics["accuracy_per_token"] == 0
    labels = []
    for item in choices:
        keys = item_keys(0, [item])
        values = [log_likelihood(scorer, item.prompt, a, 2, 2, key=keys) for a in item.answers]
        labels.append(int(np.argmax(values)))
    relabelled = [dataclasses.replace(c, label=k) for c, k in zip(choices, labels, strict=True)]
    assert set(run(scorer, CHOICE, relabelled).items.values()) == {1.0}
    wrong = [dataclasses.replace(c, label=1 - c.label) for c in relabelled]
    assert set(run(scorer, CHOICE, wrong).items.values()) == {0.0}


def test_choices_may_be_compared_by_length(uniform, choices):
    """All tokens alike, answers of 2 tokens and of 1."""
    items = [dataclasses.replace(item, characters=(4, 1), group=f"{i // 2}")
             for i, item in enumerate(choices)]  # fmt: skip
    found = {}
    for unit in ("none", "tokens", "characters"):
        task = dataclasses.replace(CHOICE, normalise=unit, mean_over="subject")
        out = run(uniform, task, items)
        assert out.other_metrics["accuracy_per_token"] == 0
        assert out.other_metrics["accuracy_per_character"] == 0
        found[unit] = set(out.items.values())
    assert found == {"none": {1.0}, "tokens": {0.0}, "characters": {0.0}}
    wrong = [dataclasses.replace(items[0], label=0), *items[1:]]  # right: 0 of 2 and 1, then 1
    task = dataclasses.replace(CHOICE, mean_over="subject")
    assert run(uniform, task, wrong).other_metrics["mean_over_subject"] == 0.75
    with pytest.raises(InputError, match="normalise='tokens' is for metric 'choice'"):
        dataclasses.replace(NELBO, normalise="tokens")


@pytest.mark.parametrize("task", [CHOICE, NELBO], ids=lambda task: task.metric)
def test_a_model_that_says_nan_has_no_score(task, scorer, choices):
    head = {"kernel": scorer.params["head"]["kernel"].at[0, 2].set(jnp.nan)}
    items = [make_item(item.prompt, item.answers, label=0) for item in choices]
    with pytest.raises(InputError, match=r"a likelihood is NaN; look for NaN"):
        run(Model(scorer.config, scorer.params | {"head": head}), task, items)


def test_an_item_that_repeats_another_counts_too(uniform, choices, scorer, items):
    right, wrong = choices[0], dataclasses.replace(choices[0], label=0)
    found = run(uniform, CHOICE, [right, wrong, wrong]).items
    assert list(found.values()) == [1.0, 0.0, 0.0] and len(set(found)) == 3
    assert len(run(scorer, GENERATION, [items[0], items[1], items[0]]).items) == 3


# --------------------------------------------------------------------------------------- account


def test_execution_and_cost_cover_every_row(scorer, items, choices):
    done = []
    static = Static((0,))
    out = run(scorer, GENERATION, items, policy=static, on_progress=done.append)
    steps = max(len(item.answers[0]) for item in items)
    assert sum(done) == count_sequences(scorer.config, GENERATION, items, static) == 5
    assert out.layer_counts.calls.sum() == 5 * steps
    np.testing.assert_array_equal(out.layer_counts.executed.sum(axis=0), [0, 5 * steps])
    assert out.flops.layers_run == 0.5
    done.clear()
    out = run(scorer, CHOICE, choices, policy=static, on_progress=done.append)
    count = 3 * (2 + 1)  # two copies of the answer of two tokens, one of the other
    assert sum(done) == count_sequences(scorer.config, CHOICE, choices, static) == count
    assert out.layer_counts.calls.sum() == count


def test_copies_that_are_all_alike_are_run_once(scorer, choices):
    sevenths = [make_item(item.prompt, [[n] for n in range(2, 9)], label=0) for item in choices]
    for policy, copies in ((None, 1), (Static((0,)), 1), (Random(1), 4)):
        found = [
            run(scorer, dataclasses.replace(CHOICE, num_samples=n), sevenths, policy=policy)
            for n in (1, 4)
        ]
        assert [out.layer_counts.calls.sum() for out in found] == [21, 21 * copies]
        if copies == 1:
            assert found[0].flops[:3] == found[1].flops[:3]
            assert (
                found[0].items == found[1].items
                and found[0].other_metrics == found[1].other_metrics
            )


def test_samples_must_fill_rounds(scorer, items):
    task = dataclasses.replace(NELBO, num_samples=20)
    with pytest.raises(InputError, match="num_samples=20 must be a multiple of 16"):
        run(scorer, task, items)


# ------------------------------------------------------------------------------------- going on


PARTS = {"exact_match": (FIRST, 2), "choice": (CHOICE, 3), "nelbo": (NELBO, 5)}


@pytest.fixture(params=PARTS)
def batch_by_batch(request, scorer, mixed, choices):
    """A task with its items, all its records as JSON keeps them, and its scores."""
    task, batch_size = PARTS[request.param]
    task = dataclasses.replace(task, bucket=1, max_programs=2)
    items = choices if task.metric == "choice" else mixed[:7]
    records = []
    whole = run(scorer, task, items, batch_size, Random(1), on_record=records.append)
    return task, items, batch_size, json.loads(json.dumps(records)), whole


def assert_same(found, whole):
    """All but the measured time, to the last bit."""
    assert found.items == whole.items and found.other_metrics == whole.other_metrics
    assert found.layer_counts.to_dict() == whole.layer_counts.to_dict()
    assert found.examples == whole.examples
    assert found.flops._replace(seconds=0) == whole.flops._replace(seconds=0)


def test_what_is_recorded_is_not_scored_again(scorer, batch_by_batch):
    task, items, batch_size, records, whole = batch_by_batch
    assert len(records) > 2
    for kept in (records[:2], records[:1] + records[2:], [*records[:2], records[0]], records):
        done, new = [], []
        found = run(
            scorer, task, items, batch_size, Random(1),
            on_progress=done.append, records=kept, on_record=new.append,
        )  # fmt: skip
        assert_same(found, whole)
        assert len(new) == len(records) - len({json.dumps(record) for record in kept})
        assert sum(done) == count_sequences(scorer.config, task, items, Random(1))


def test_the_rest_may_be_scored_in_other_batches(scorer, batch_by_batch):
    task, items, batch_size, records, whole = batch_by_batch
    found = run(scorer, task, items, batch_size - 1, Random(1), records=records[1:3])
    assert_equal_scores(found.items, whole.items)
    assert found.layer_counts.to_dict() == whole.layer_counts.to_dict()
    assert found.examples == whole.examples


def test_log_0_is_recorded_as_json_has_it(uniform, choices):
    records = []
    run(uniform, CHOICE, choices, on_record=records.append)
    records = finite(records)
    records[0]["scores"][0][3] = None
    name = records[0]["scores"][0][0]
    pairs = {pair: n + first for r in records for pair, first, n, _ in r["scores"]}
    assert Tally(2, pairs, records).mean(name) == -np.inf
