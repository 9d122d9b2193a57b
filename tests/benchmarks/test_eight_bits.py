"""The comparison of 8 bits with the same model without them."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import eight_bits_answers as answers_module
from benchmarks.eight_bits import score_rows, with_caches
from benchmarks.eight_bits_answers import SCHEDULE, Models, answer_rows, gates_of, nelbos_of, write
from benchmarks.eight_bits_ranges import PRODUCTS, measure, products
from dials_jax.caching.parse import parse_cache
from dials_jax.config import ArithmeticData
from dials_jax.errors import InputError
from dials_jax.evaluation.items import make_item
from dials_jax.evaluation.task import EvalConfig, EvalTask
from dials_jax.models.model import Model
from dials_jax.sampling.confidence import Confidence
from dials_jax.skipping.routed import Routed
from dials_jax.training.run import unroll

SAMPLER = Confidence(gen_length=4, block_length=2, steps=4)
TASK = EvalTask(name="t", metric="exact_match", data=ArithmeticData(), limit=3, sampler=SAMPLER)
ITEMS = [make_item([3, 4, 5], [[6, 7]]), make_item([3, 4], [[6, 7]])]


def run_of(policy, scores, layers=None):
    facts = {"label": policy} | ({"layers": layers} if layers else {})
    return {"task": "t", "metric": "nelbo", "policy": facts, "items": scores}


def test_scores_are_paired_by_item_under_the_same_policy():
    plain = {"runs": [run_of("full", {"a": 1.0, "b": 2.0, "c": 4.0}), run_of("k=1", {"a": 1}, [2])]}
    other = {"runs": [run_of("k=1", {"a": 1}, [3]), run_of("full", {"c": 4.5, "a": 1.1, "b": 2.3})]}
    [row] = score_rows(plain, other)  # the static policies leave out other layers
    assert row["difference"] == pytest.approx(0.3)
    assert row["in_8_bits"] - row["plain"] == pytest.approx(0.3)
    half = 4.3027 * np.std([0.5, 0.1, 0.3], ddof=1) / 3**0.5
    assert (row["low"], row["high"]) == pytest.approx((0.3 - half, 0.3 + half), abs=1e-4)


def test_gates_are_compared_on_the_same_masked_answers(lively, routers):
    policy, answers = Routed(routers, 0.3), np.array([[6, 7], [8, 9]])
    gates = [gates_of(lively, policy, ITEMS, answers, seed=0) for _ in range(2)]
    assert gates[0].shape == (lively.num_layers, 2)
    np.testing.assert_array_equal(*gates)


def test_caches_repeat_the_tasks_that_generate():
    other = EvalTask(name="n", metric="nelbo", data=ArithmeticData())
    cfg = with_caches(EvalConfig(model="m", tasks=(TASK, other)), ["dual", "es-4-2"])
    assert [task.name for task in cfg.tasks] == ["t", "n", "t, dual", "t, es-4-2"]
    assert [task.cache for task in cfg.tasks[2:]] == [parse_cache("dual"), parse_cache("es-4-2")]


def test_all_ways_of_writing_are_compared(arithmetic_model, other_model):
    cfg = EvalConfig(model=str(arithmetic_model), tasks=(TASK,), batch_size=3)
    cfg = with_caches(cfg, ["dual"])
    rows = list(answer_rows(cfg, "int8", 3, 2, str(other_model)))
    found = {(row["task"], row["policy"], row["measure"]) for row in rows}
    ways = [("t", "full"), ("t", SCHEDULE), ("t, dual", "full")]
    measures = "same tokens", "own NELBO", "exact_match"
    assert found == {(*way, measure) for way in ways for measure in measures}
    assert all(row["items"] == 3 for row in rows)
    with pytest.raises(InputError, match="'t, es-4-2', full: depths="):
        next(answer_rows(with_caches(cfg, ["es-4-2"]), "int8", 3, 2))


def test_a_schedule_takes_both_models(lively, model):
    cfg = EvalConfig(model="", batch_size=2)
    models = Models(lively, model, {"full": None})
    task = dataclasses.replace(TASK, data=ArithmeticData())
    texts = {
        share: write(cfg, task, ITEMS, models, SCHEDULE, light_share=share) for share in (0.0, 0.5)
    }
    np.testing.assert_array_equal(texts[0.0], write(cfg, task, ITEMS, models, "full", 0.5))
    assert (texts[0.0] != texts[0.5]).any()


def test_texts_are_scored_with_the_same_masks_and_equal_ones_once(lively, monkeypatch):
    scored = []

    def log_likelihoods(model, pairs, **settings):
        scored.extend(pairs)
        return np.array([-float(sum(answer)) for _, answer in pairs])

    monkeypatch.setattr(answers_module, "log_likelihoods", log_likelihoods)
    texts = np.array([[6, 7], [8, 9]]), np.array([[6, 7], [8, 5]])
    found = nelbos_of(EvalConfig(model=""), TASK, ITEMS, lively, texts, 2)
    assert [list(one.values()) for one in found] == [[6.5, 8.5], [6.5, 6.5]]
    assert len(scored) == 3


def test_the_products_are_those_of_the_model(lively):
    cfg = lively.config
    unrolled = Model(cfg, unroll(lively.params))
    tokens, valid = np.array([[3, 4, 5, 6], [0, 4, 5, 6]]), np.ones((2, 4), bool)
    valid[1, 0] = False
    found = list(products(unrolled, tokens, valid))
    names = [(layer, name) for layer, name, *_ in found]
    assert names == [(str(n), x) for n in range(cfg.num_layers) for x in PRODUCTS] + [("", "head")]
    _, _, x, weight = found[-1]  # after all layers: what the model says
    np.testing.assert_allclose(x @ weight, unrolled.apply(tokens, valid).logits[valid], atol=1e-4)
    for _, _, x, weight in found:
        assert x.shape == (7, weight.shape[0])


def test_an_outlier_channel_shows_and_smoothing_takes_it_away():
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(64, 32)), rng.normal(size=(32, 16))
    plain = measure(jnp.asarray(x), jnp.asarray(weight))
    assert plain["x_kurtosis"] == pytest.approx(3, abs=0.5) and plain["x_channel"] < 2
    x[:, 5] *= 100
    weight[5] /= 100
    wild = measure(jnp.asarray(x), jnp.asarray(weight))
    assert wild["x_channel"] > 50 and wild["x_kurtosis"] > 20
    assert wild["int8"] > 10 * plain["int8"] and wild["int8_s"] < 3 * plain["int8"]
    assert wild["fp8"] < 2 * plain["fp8"]  # its steps are relative
