"""Policies, caches and samplers in 8 bits, against the plain decoder in 8 bits.

Here some compositions, which have every policy, class of caches and of samplers, model and kind of
8 bits between them; `python -m tests.eight_bits` runs all.
"""

import dataclasses
from typing import Literal, get_args, get_origin

import pytest

from dials_jax import caching, sampling, skipping
from dials_jax.caching.early_skip.settings import EarlySkip
from dials_jax.config.typed import field_hints
from tests.eight_bits.compositions import (
    CACHES,
    KINDS,
    MODELS,
    POLICIES,
    SAMPLERS,
    Composition,
    check,
    classes_of,
    compositions,
    loaded,
    policies_of,
    refusal,
)

ELSEWHERE = ("autoregressive", "block diffusion")  # for models of other families
RUNNING = [x for name, x in SAMPLERS.items() if name not in ELSEWHERE]
CHOSEN = [  # tests/caching/test_eight_bits.py has EarlySkip
    ("llada_tiny", "int8", "static gates", "prefix", "bound"),
    ("dream_tiny", "fp8", "random", "none", "maskgit_plus"),
    ("dream_tiny", "int8", "static", "dual", "appended"),
    ("llada_tiny", "fp8", "soft", "none", "guided"),
    ("llada_tiny", "fp8", "routed", "none", "ancestral"),
    ("dream_tiny", "int8", "full", "none", "one a step"),
]
COMPACT = "ancestral"  # the other way to leave rows out; it takes longer to compile


@pytest.mark.usefixtures("untyped")  # other tests check the types; here it takes a third more
@pytest.mark.parametrize("composition", CHOSEN, ids=" ".join)
def test_every_decision_is_that_of_the_plain_decoder(composition):
    composition = Composition(*composition)
    executor = "compact" if composition.sampler == COMPACT else "select"
    assert check(composition, executor) is not None


def test_what_does_not_compose_is_refused_in_one_line():
    refused = {}
    for one in compositions(MODELS[:1], KINDS[:1]):
        if refusal(one):
            refused.setdefault((refusal(one), one.cache, one.sampler), one)
    assert len(refused) > 50
    for one in refused.values():
        assert check(one) is None


# ------------------------------------------------------------------------- nothing is left out


def test_the_tests_run_a_composition_of_everything():
    models, kinds, policies, caches, samplers = map(set, zip(*CHOSEN, strict=True))
    assert models == set(MODELS) and kinds == set(KINDS) and policies == set(POLICIES)
    assert types(CACHES[x] for x in caches) == types(CACHES.values()) - {EarlySkip}
    assert types(SAMPLERS[x] for x in samplers) == types(RUNNING)


def test_every_composition_runs_on_both_models_and_in_both_kinds():
    everything = [one for one in compositions() if refusal(one) is None]
    assert len(everything) == len(set(everything)) > 600
    by_name = {}
    for one in everything:
        by_name.setdefault(one[2:], set()).add(one[:2])
    for met in by_name.values():
        models, kinds = map(set, zip(*met, strict=True))
        assert models == set(MODELS) and kinds == set(KINDS)


def types(settings):
    return {type(x) for x in settings}


TRAINING_ONLY = {"StochasticRouted"}


def test_every_policy_cache_and_sampler_is_in_a_composition():
    """A new class, setting or choice has to be added to the compositions."""
    policies = policies_of(loaded(MODELS[0], KINDS[0]).config)
    assert tuple(policies) == POLICIES
    known = {type(x).__name__ for x in policies.values() if x is not None}
    assert names(classes_of(skipping, "prepare", "gate")) == known | TRAINING_ONLY
    known = {type(x).__name__ for x in CACHES.values() if x is not None} | {"NoCache"}
    assert names(classes_of(caching, "forward_variants", "init_state")) == known
    known = {type(x).__name__ for x in SAMPLERS.values()}
    assert names(classes_of(sampling, "make_steps", "count_steps")) == known


def names(classes):
    return {cls.__name__ for cls in classes}


SETTINGS = [*RUNNING, *(x for x in CACHES.values() if x is not None)]


@pytest.mark.parametrize("cls", sorted({type(x) for x in SETTINGS}, key=lambda x: x.__name__))
def test_every_setting_and_every_choice_is_in_a_composition(cls):
    given = [x for x in SETTINGS if type(x) is cls]
    for field in dataclasses.fields(cls):
        values = {getattr(x, field.name) for x in given}
        hint = field_hints(cls)[field.name]
        if get_origin(hint) is Literal:
            assert values == set(get_args(hint)), field.name
        elif field.default is not dataclasses.MISSING:
            assert values - {field.default}, f"{cls.__name__}.{field.name} is always its default"


def test_both_kinds_of_votes_are_in_a_composition():
    policies = policies_of(loaded(MODELS[0], KINDS[0]).config)
    votes = {x.votes for x in policies.values() if hasattr(x, "votes")}
    assert votes == set(get_args(field_hints(type(policies["routed"]))["votes"]))
