"""A policy class of one's own that routes like `Routed` does and costs the same, everywhere."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dials_jax as dj
from dials_jax.errors import InputError
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


@jax.tree_util.register_dataclass
@dataclass
class Given:
    """Gates, and what is prepared for each layer, as a function says."""

    decide: Any = field(metadata={"static": True})
    slices: int = field(default=4, metadata={"static": True})

    def prepare(self, num_layers, denoising):
        return jnp.zeros(self.slices)

    def gate(self, prepared, h, denoising):
        return self.decide(h)


class Unregistered(Own):
    """No pytree."""


@pytest.mark.parametrize(
    "policy, expected",
    [
        (Unregistered(None), "policy Unregistered is no pytree; register it"),
        (Given(lambda h: None), "gate gave NoneType; give one bool, or an array"),
        (Given(lambda h: [True, False]), "gate gave list; give one bool, or an array"),
        (Given(lambda h: h[:, :1, 0] > 0), r"gate gave bool of shape \[2, 1\]; give one bool, or"),
        (Given(lambda h: jnp.mean(h, (0, 2)) > 0), r"of shape \[\d+\]; give one bool"),
        (Given(lambda h: jnp.arange(2)), r"gate gave int32 of shape \[2\]; give one bool"),
        (Given(lambda h: jnp.ones(2)), "drops a float gate's gradient; use 'select'"),
        (Given(lambda h: True, slices=3), "prepare must give a slice for each of 4 layers"),
    ],
)
def test_a_wrong_policy_is_refused_in_one_line(lively, policy, expected):
    prompts = np.random.default_rng(0).integers(2, 60, (2, 5))
    with pytest.raises(InputError, match=expected):
        dj.generate(lively, prompts, sampler=QUOTA_4, policy=policy)


def test_a_gate_may_be_a_boolean_of_python(lively):
    prompts = np.random.default_rng(0).integers(2, 60, (2, 5))
    out = dj.generate(lively, prompts, sampler=QUOTA_4, policy=Given(lambda h: True))
    assert out.gates.all()


def test_cond_wants_one_decision(lively, pair):
    prompts = np.random.default_rng(0).integers(2, 60, (2, 5))
    with pytest.raises(InputError, match="executor='cond' needs one decision"):
        dj.generate(lively, prompts, sampler=QUOTA_4, policy=pair[0], executor="cond")
