"""Caches, policies and samplers together, against a plain decoder of one sequence."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dials_jax.caching import cache as cache_module
from dials_jax.caching.early_skip.settings import EarlySkip
from dials_jax.errors import InputError
from dials_jax.reference import Decoder
from dials_jax.sampling.confidence import Confidence
from dials_jax.sampling.generate import generate
from tests.caching.cases import (
    CACHES,
    QUOTA,
    QUOTA_4,
    THRESHOLD,
    G,
    P,
    keys_of,
    policies_of,
)
from tests.conftest import MASK

ENTROPY = Confidence(gen_length=G, block_length=8, entropy_threshold=2.0)
BOUND = Confidence(gen_length=G, block_length=8, entropy_bound=2.0)
SAMPLERS = {
    "quota": QUOTA, "quota 4": QUOTA_4, "threshold": THRESHOLD, "entropy": ENTROPY, "bound": BOUND,
    "edit": dataclasses.replace(THRESHOLD, edit_threshold=0.4, max_edit_steps=5),
    "edit by entropy": dataclasses.replace(BOUND, edit_threshold=0.3, max_edit_steps=3),
}  # fmt: skip
# Compaction only in small programs: it has a branch for every number of sequences. For EarlySkip it
# is compared with selection in tests/test_mesh.py.
CASES = [
    ("llada", "none", "routed", "threshold", "compact"),
    ("llada", "prefix", "soft", "quota", "select"),
    ("llada", "prefix", "random", "threshold", "select"),
    ("llada", "dual", "soft", "quota", "compact"),
    ("llada", "dual", "routed", "threshold", "select"),
    ("llada", "hidden", "static", "quota 4", "auto"),
    ("dream", "hidden", "static", "quota", "auto"),
    ("llada", "skip", "routed", "quota", "select"),
    ("llada", "hidden", "routed", "threshold", "select"),
    ("llada", "query", "full", "quota", "auto"),
    ("llada", "neighbours", "full", "quota", "auto"),
    ("dream", "key", "full", "threshold", "auto"),
    ("dream", "value", "full", "quota", "auto"),
    ("dream", "none", "routed", "quota", "select"),
    ("dream", "prefix", "routed", "quota", "select"),
    ("unrolled", "dual", "random", "quota", "select"),
    ("dream", "dual", "routed", "threshold", "select"),
    ("unrolled", "hidden", "soft", "quota", "select"),
    ("llada", "none", "full", "entropy", "auto"),
    ("dream", "prefix", "static", "bound", "auto"),
    ("llada", "none", "routed", "edit", "select"),
    ("dream", "prefix", "random", "edit by entropy", "select"),
    ("llada", "dual", "routed", "edit", "compact"),
]


@pytest.mark.parametrize("family, cache, policy, rule, executor", CASES)
def test_every_sequence_of_a_padded_batch_is_what_the_plain_decoder_gives(
    models, prompts, family, cache, policy, rule, executor
):
    settings = {
        "sampler": SAMPLERS[rule], "cache": CACHES[cache], "key": keys_of(3),
        "policy": policies_of(models[family].config)[policy],
    }  # fmt: skip
    out = generate(models[family], *prompts, **settings, executor=executor)
    stacked = models["dream" if family == "unrolled" else family]
    gates = assert_equal_to_the_decoder(out, stacked, prompts, **settings)
    if policy in (
        "random",
        "routed",
        "soft",
    ):  # or the comparison would not see the sequences decide
        seen = np.array([gate for calls in gates for gate in calls.values()])
        assert 0.2 < seen.mean() < 0.95 and (seen != seen[:1]).any()
    if rule == "threshold":
        assert out.nfe < G and len({len(g) for g in gates}) > 1


def assert_equal_to_the_decoder(out, model, prompts, key, **settings):
    """Compares tokens and gates per sequence; returns the gates that the decoder gives."""
    tokens, valid = prompts
    decoders = [Decoder(model, tokens[i, valid[i]], **settings, key=key[i]) for i in range(3)]
    gates = [decoder.decode() for decoder in decoders]
    own = np.array([gate for calls in gates for gate in calls.values()])
    assert out.flops.layers_run == pytest.approx(own.mean())  # no calls that others needed
    calls = sorted(set().union(*gates))  # a batch goes on until its last sequence is done
    assert out.nfe == len(calls)
    np.testing.assert_array_equal(out.passes, [len(own) for own in gates])
    np.testing.assert_array_equal(out.tokens[:, :P], tokens)
    assert not (out.tokens[:, P:] == MASK).any()
    for i, decoder in enumerate(decoders):
        np.testing.assert_array_equal(
            out.tokens[i, P:], decoder.tokens[decoder.prompt_length :], err_msg=f"{i}"
        )
        for call, expected in gates[i].items():
            actual = out.gates[calls.index(call), :, i]
            np.testing.assert_array_equal(actual, expected, err_msg=f"sequence {i}, call {call}")
    return gates


@pytest.mark.parametrize(
    "rule, message",
    [
        ("edit", "EarlySkip leaves revealed tokens out, so they cannot be revised"),
        ("bound", "EarlySkip weighs confidence against change"),
    ],
)
def test_what_early_skip_does_not_compose_with(models, prompts, rule, message):
    with pytest.raises(InputError, match=message) as info:
        generate(models["llada"], *prompts, sampler=SAMPLERS[rule], cache=CACHES["skip"])
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("cache", ["prefix", "skip"])
def test_rounding_windows_up_changes_nothing(models, prompts, policies, monkeypatch, cache):
    round_up(monkeypatch)
    sampler = {"prefix": THRESHOLD, "skip": QUOTA}[cache]
    settings = {
        "sampler": dataclasses.replace(sampler, gen_length=24, steps=24),
        "cache": {"prefix": CACHES["prefix"], "skip": EVERY_BLOCK}[cache],
        "policy": policies["routed"],
        "key": keys_of(3),
    }
    out = generate(models["llada"], *prompts, **settings, executor="select")
    assert_equal_to_the_decoder(out, models["llada"], prompts, **settings)
    if cache == "skip":
        np.testing.assert_array_equal(out.tokens_run[[8, 16]], P + 24)


def round_up(monkeypatch):
    """Windows of one and two blocks become windows of three."""
    monkeypatch.setattr(cache_module, "MAX_SIZES", 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Crowd:
    """Skips all layers where more tokens vote than `limit`."""

    limit: Any

    def prepare(self, num_layers, denoising):
        return np.arange(num_layers)

    def gate(self, plan, h, denoising):
        return jnp.sum(denoising.masked, axis=1) <= self.limit


def test_tokens_that_only_fill_a_window_do_not_vote(models, prompts, monkeypatch):
    """A block's first step sees its 8 masked tokens, and not those of the blocks that follow."""
    round_up(monkeypatch)
    sampler = Confidence(gen_length=24, block_length=8, steps=24)

    def gates(limit):
        return generate(
            models["llada"], *prompts, sampler=sampler, cache=STAYING, policy=Crowd(limit),
            executor="select",
        ).gates  # fmt: skip

    assert gates(8).all()
    fewer = gates(7)
    assert fewer[0].all()  # nothing is cached yet, so that no gate counts
    assert not fewer[[8, 16]].any() and np.delete(fewer, [8, 16], axis=0).all()


EVERY_BLOCK = EarlySkip((1.0, 0.5), (0.0, 0.5), prompt_every=8, block_every=8)
STAYING = EarlySkip((1.0,), (0.0,), prompt_every=8, block_every=8)
