"""Sets of layers as an argument: one program, with the results of one program per set."""

from itertools import combinations

import numpy as np
import pytest

from dials_jax.caching.plain import DualCache
from dials_jax.errors import InputError
from dials_jax.nn.policy import policy_name, uses_keys
from dials_jax.sampling import generate as generating
from dials_jax.sampling.confidence import Confidence
from dials_jax.skipping.policies import Static, StaticGates

SETS = [layers for k in (1, 2) for layers in combinations(range(4), k)]
PROMPTS = np.array([[3, 4, 5], [7, 8, 9]])
SAMPLER = Confidence(gen_length=4, block_length=2)


def run(model, policy):
    return generating.generate(model, PROMPTS, sampler=SAMPLER, cache=DualCache(), policy=policy)


def test_one_program_gives_every_set_the_results_of_its_own(lively, traced_once):
    own = {layers: run(lively, Static(layers)) for layers in (SETS[1], SETS[8])}
    traced_once(generating, "generate_program")
    outs = {layers: run(lively, StaticGates.of(layers, 4)) for layers in SETS}
    assert len(SETS) == 10 and len({out.tokens.tobytes() for out in outs.values()}) > 1
    for layers, out in outs.items():
        # Also on the first call, which fills the caches: those of skipped layers are never read.
        skipped = np.isin(np.arange(4), layers)
        assert (out.gates == ~skipped[:, None]).all()
    for layers, expected in own.items():
        found = outs[layers]
        np.testing.assert_array_equal(found.tokens, expected.tokens)
        np.testing.assert_array_equal(found.gates, expected.gates)
        assert found.flops[:3] == expected.flops[:3]


def test_it_is_a_static_policy():
    policy = StaticGates.of((1, 3), 4)
    assert policy.gates.tolist() == [True, False, True, False]
    assert policy_name(policy) == "static" and not uses_keys(policy)


def test_layers_that_do_not_exist_are_refused(lively):
    with pytest.raises(InputError, match="layer 4 does not exist"):
        StaticGates.of((4,), 4)
    with pytest.raises(InputError, match=r"gates has shape \(3,\), and the model 4 layers"):
        run(lively, StaticGates.of((1,), 3))
