"""The comparison of 8 bits with the same model without them."""

import numpy as np
import pytest

from benchmarks.eight_bits import gates_of, score_rows
from dials_jax.evaluation.items import make_item
from dials_jax.skipping.routed import Routed


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
    items = [make_item([3, 4, 5], [[6, 7]], 0, ""), make_item([3, 4], [[6, 7]], 0, "")]
    policy, answers = Routed(routers, 0.3), np.array([[6, 7], [8, 9]])
    gates = [gates_of(lively, policy, items, answers, seed=0) for _ in range(2)]
    assert gates[0].shape == (lively.num_layers, 2)
    np.testing.assert_array_equal(*gates)
