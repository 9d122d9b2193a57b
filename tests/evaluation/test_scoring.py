"""Scores on items of a tokenizer of digits, with models that are random or know nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dials_jax.config import ArithmeticData, EvalTask, InputError
from dials_jax.data.arithmetic import ArithmeticTask
from dials_jax.data.items import load_items, make_item
from dials_jax.evaluation.likelihood import log_likelihood
from dials_jax.evaluation.scoring import item_keys, num_rows, score_task
from dials_jax.models import transformer
from dials_jax.models.model import Model
from dials_jax.skipping.policies import Random, Static
from tests.conftest import small_config

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
    params = transformer.init(cfg, jax.random.key(0))
    kernel = 60 * params["head"]["kernel"]
    kernel = kernel.at[:, jnp.array([cfg.mask_id, cfg.pad_id, cfg.eos_id])].set(0.0)
    return Model(cfg, {**params, "head": {"kernel": kernel}})


@pytest.fixture(scope="module")
def uniform(scorer):
    head = jax.tree.map(jnp.zeros_like, scorer.params["head"])
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
    outputs = {e["prompt"]: e["output"] for e in first.examples}
    assert len(outputs) == 5 and all(outputs.values())
    references = [outputs[TOKENIZER.decode(item.prompt)] for item in items[:3]] + ["?", "?"]
    right = [
        dataclasses.replace(item, reference=reference)
        for item, reference in zip(items, references, strict=True)
    ]
    second = run(scorer, GENERATION, right)
    assert [second.items[str(item.key)] for item in items] == [1, 1, 1, 0, 0]
    assert [e["correct"] for e in second.examples].count(True) == 3


def test_text_after_the_end_does_not_count(scorer, items):
    cfg = scorer.config
    bias = jnp.zeros(cfg.vocab_size).at[cfg.eos_id].set(1e4)
    silent = Model(
        dataclasses.replace(cfg, bias=True),
        jax.tree.map(
            jnp.zeros_like, transformer.init(dataclasses.replace(cfg, bias=True), jax.random.key(0))
        )
        | {"head": {"kernel": jnp.zeros((32, cfg.vocab_size)), "bias": bias}},
    )
    empty = [dataclasses.replace(item, reference="") for item in items]
    assert set(run(silent, GENERATION, empty).items.values()) == {1.0}
    assert {e["output"] for e in run(silent, GENERATION, items).examples} == {""}


def test_order_and_batches_change_no_exact_match(scorer, items):
    whole = run(scorer, GENERATION, items, batch_size=2, policy=Random(1))
    parts = run(scorer, GENERATION, items[::-1], batch_size=1, policy=Random(1))
    assert parts.items == whole.items
    assert parts.execution.to_dict() == whole.execution.to_dict()
    outputs = [sorted(e["output"] for e in scores.examples) for scores in (whole, parts)]
    assert outputs[0] == outputs[1]


# ------------------------------------------------------------------------------------ likelihood


def test_nelbo_is_nats_a_token(scorer, uniform, items):
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
    assert parts.execution.to_dict() == whole.execution.to_dict()


def test_the_most_likely_choice_is_chosen(scorer, uniform, choices):
    # All tokens alike: the shortest answer wins in all, and by the token the first of equals.
    found = run(uniform, CHOICE, choices)
    assert set(found.items.values()) == {1.0} and len(found.items) == 3
    assert found.also["accuracy_per_token"] == 0
    labels = []
    for item in choices:
        keys = item_keys(0, [item])
        values = [log_likelihood(scorer, item.prompt, a, 2, 2, key=keys) for a in item.answers]
        labels.append(int(np.argmax(values)))
    relabelled = [dataclasses.replace(c, label=k) for c, k in zip(choices, labels, strict=True)]
    assert set(run(scorer, CHOICE, relabelled).items.values()) == {1.0}
    wrong = [dataclasses.replace(c, label=1 - c.label) for c in relabelled]
    assert set(run(scorer, CHOICE, wrong).items.values()) == {0.0}


# --------------------------------------------------------------------------------------- account


def test_execution_and_cost_cover_every_row(scorer, items, choices):
    done = []
    static = Static((0,))
    out = run(scorer, GENERATION, items, policy=static, progress=done.append)
    steps = max(len(item.answers[0]) for item in items)
    assert sum(done) == num_rows(GENERATION, items) == 5
    assert out.execution.rows.sum() == 5 * steps
    np.testing.assert_array_equal(out.execution.executed.sum(axis=0), [0, 5 * steps])
    assert out.flops.layers_run == 0.5
    done.clear()
    out = run(scorer, CHOICE, choices, policy=static, progress=done.append)
    assert sum(done) == num_rows(CHOICE, choices) == 2 * 3 * 2 == out.execution.rows.sum()


def test_samples_must_fill_rounds(scorer, items):
    task = dataclasses.replace(NELBO, num_samples=20)
    with pytest.raises(InputError, match="num_samples=20 must be a multiple of 16"):
        run(scorer, task, items)
