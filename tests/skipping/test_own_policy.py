"""A policy class of one's own that routes like `Routed` does and costs the same, everywhere."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import pytest

import dials_jax as dj
from dials_jax.evaluation.likelihood import num_copies, score_pairs
from dials_jax.evaluation.pairs import pad_pairs
from dials_jax.skipping.routed import Routed
from tests.caching.cases import CACHES, QUOTA_4


@jax.tree_util.register_dataclass
@dataclass
class Own:
    """All that `Routed` does, and none of what it is."""

    inner: Any

    name = "own"
    uses_keys = False

    def prepare(self, num_layers, denoising):
        return self.inner.prepare(num_layers, denoising)

    def gate(self, prepared, h, denoising):
        return self.inner.gate(prepared, h, denoising)

    def flops(self, cfg, num_tokens):
        return self.inner.flops(cfg, num_tokens)


@pytest.fixture(scope="module")
def pair(routers):
    routed = Routed(routers, 0.4)
    return routed, Own(routed)


def assert_same_cost(one, other):
    assert one._replace(seconds=0.0) == other._replace(seconds=0.0)


@pytest.mark.parametrize("cache", ["none", "dual", "skip"])
def test_generating_with_it_costs_what_routing_costs(lively, pair, cache):
    prompts = np.random.default_rng(0).integers(2, 60, (2, 5))
    settings = {"sampler": QUOTA_4, "cache": CACHES[cache], "executor": "select"}
    routed, own = (dj.generate(lively, prompts, policy=p, **settings) for p in pair)
    np.testing.assert_array_equal(routed.gates, own.gates)
    assert_same_cost(routed.flops, own.flops)
    free = dj.generate(lively, prompts, policy=dj.Static(()), **settings).flops
    assert own.flops.flops_share > own.flops.layers_run * free.flops_share  # routers do cost


def test_likelihoods_with_it_cost_what_routing_costs(lively, cfg, pair):
    texts = [([5, 6, 7], [8, 9, 10, 11]), ([5, 6], [9, 9])]
    keys, copies = jax.random.split(jax.random.key(0), 2), np.zeros(2, int)
    (routed, cost), (own, own_cost) = (
        score_pairs(lively, pad_pairs(texts, lively.config), keys, copies, stratum=1, policy=p)
        for p in pair
    )
    np.testing.assert_array_equal(routed.gates, own.gates)
    assert_same_cost(cost, own_cost)
    assert own_cost.flops_share > own_cost.layers_run * 0.9
    assert num_copies(cfg, 1, 128, pair[1]) == num_copies(cfg, 1, 128, pair[0]) == 1
