"""iLLaDA generates its authors' tokens: on whole canvases, and in blocks that are appended."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from dials_jax.caching import cache as caching
from dials_jax.caching.early_skip.settings import EarlySkip
from dials_jax.caching.plain import DualCache, PrefixCache
from dials_jax.errors import InputError
from dials_jax.loading import load
from dials_jax.models.model import Model
from dials_jax.sampling import generate as generating
from dials_jax.sampling.confidence import Confidence
from dials_jax.sampling.end_of_thinking import next_of
from dials_jax.sampling.generate import generate
from dials_jax.sampling.refill import why_not_refilled
from dials_jax.skipping.policies import Static
from dials_jax.skipping.routed import Routed
from tests.conftest import random_routers, silence

GOLDEN = Path(__file__).parents[1] / "golden" / "illada_tiny"


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN / "golden.npz")


@pytest.fixture(scope="module")
def illada():
    return load(GOLDEN)


def appending(golden, number):
    """The sampler of a published `var_generate`, whose steps are those of one block."""
    args = json.loads(str(golden[f"var_generate_{number}_args"]))
    length, block = args["gen_length"], args["block_length"]
    sampler = Confidence(
        length,
        block,
        args["steps"] * length // block,
        append_blocks=True,
        stop_ids=tuple(args["stop_ids"]),
        end_think_ids=tuple(args.get("end_think_token_ids", ())),
        end_think_boost=args.get("end_think_logit_boost", 0.0),
        end_think_power=args.get("end_think_boost_power", 2.0),
    )
    return sampler, args["row"]


@pytest.mark.parametrize("number", range(3))
def test_generate_gives_the_authors_tokens(golden, illada, number):
    sampler = Confidence(**json.loads(str(golden[f"generate_{number}_args"])))
    out = generate(illada, golden["prompt"], sampler=sampler)
    np.testing.assert_array_equal(out.tokens, golden[f"generate_{number}"])
    assert out.nfe == golden[f"generate_{number}_nfe"]


@pytest.mark.parametrize("number", range(4))
def test_appended_blocks_give_the_authors_tokens_in_as_many_calls(golden, illada, number):
    sampler, row = appending(golden, number)
    out = generate(illada, golden["prompt"][row : row + 1], sampler=sampler)
    theirs = golden[f"var_generate_{number}"]
    np.testing.assert_array_equal(out.tokens[:, : theirs.shape[1]], theirs)
    assert (out.tokens[:, theirs.shape[1] :] == illada.config.eos_id).all()
    assert out.nfe == golden[f"var_generate_{number}_nfe"]


@pytest.fixture
def few_sizes(monkeypatch):
    """Windows of two sizes only, so that most calls compute a block that does not exist yet."""
    monkeypatch.setattr(caching, "MAX_SIZES", 2)
    for name in ("generate_program", "segment_program"):
        monkeypatch.setattr(generating, name, getattr(generating, name).traced_anew())


def test_what_a_rounded_window_computes_beyond_the_block_changes_nothing(golden, illada, few_sizes):
    sampler, row = appending(golden, 0)
    out = generate(illada, golden["prompt"][row : row + 1], sampler=sampler)
    np.testing.assert_array_equal(out.tokens, golden["var_generate_0"])
    assert set(out.tokens_run[:, 0]) == {10 + 16, 10 + 32}


def test_each_sequence_of_a_padded_batch_ends_by_itself(golden, illada):
    """Row 2 meets its stop token in the second block; a row with padding is as without."""
    sampler, _ = appending(golden, 2)
    short = golden["prompt"][2:, 4:]
    prompts = np.concatenate([golden["prompt"], np.pad(short, ((0, 0), (4, 0)))])
    valid = np.ones(prompts.shape, bool)
    valid[3, :4] = False
    together = generate(illada, prompts, valid, sampler=sampler)
    for row, prompt in enumerate([*golden["prompt"], short[0]]):
        alone = generate(illada, prompt[None], sampler=sampler)
        np.testing.assert_array_equal(together.tokens[row, 10:], alone.tokens[0, len(prompt) :])
        assert together.passes[row] == alone.nfe
    assert len(set(together.passes)) > 1, "one sequence should stop before another"


@pytest.mark.parametrize(
    "routed, cache",
    [(True, None), (True, DualCache()), (False, PrefixCache())],
    ids=["routed", "routed, dual", "static, prefix"],
)
def test_appending_two_blocks_is_generating_twice(golden, illada, routed, cache):
    """As in the published code, whose prompt is all that came before; the same layers run."""
    illada = Model(illada.config, silence(illada.params, illada.config.mask_id))
    policy = Routed(random_routers(illada.config), 0.4) if routed else Static((1, 3))
    one, run = Confidence(6, steps=3), {"policy": policy, "cache": cache}
    first = generate(illada, golden["prompt"], sampler=one, **run)
    second = generate(illada, first.tokens, sampler=one, **run)
    sampler = Confidence(12, 6, 6, append_blocks=True)
    both = generate(illada, golden["prompt"], sampler=sampler, **run)
    np.testing.assert_array_equal(both.tokens, second.tokens)
    np.testing.assert_array_equal(both.gates, np.concatenate([first.gates, second.gates]))
    np.testing.assert_allclose(
        both.masked_share[3:], second.masked_share / 2, err_msg="half of it is the first block"
    )


def test_thinking_goes_on_with_the_longest_beginning_of_its_end():
    ids = (7, 7, 8)
    answers = jnp.array([[7, 7, 0, 0], [5, 7, 0, 0], [7, 5, 0, 0], [0, 0, 0, 0]])
    assert next_of(answers, jnp.array([2, 2, 2, 0]), ids).tolist() == [8, 7, 7, 7]


def test_settings_that_do_not_compose_are_refused(golden, illada):
    prompts = golden["prompt"]

    def refused(match, cache=None, **settings):
        with pytest.raises(InputError, match=match):
            generate(illada, prompts, sampler=Confidence(8, 4, 8, **settings), cache=cache)

    refused("EarlySkip computes the whole canvas", EarlySkip(), append_blocks=True)
    refused("logits_eos_inf=True is LLaDA's", logits_eos_inf=True)
    refused("stop_ids has 208, outside the vocabulary", stop_ids=(208,))
    with pytest.raises(InputError, match="give both the tokens and their gain"):
        Confidence(8, end_think_boost=1.0)
    why = why_not_refilled(Confidence(8, append_blocks=True), None, illada.config)
    assert "append_blocks" in why


def test_a_longer_answer_has_as_many_steps_in_a_block():
    sampler = Confidence(32, 8, 16, append_blocks=True).with_length(64)
    assert (sampler.steps, sampler.steps_per_block) == (32, 4)
