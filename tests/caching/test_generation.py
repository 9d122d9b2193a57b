"""What every cache keeps to when it generates: limits, costs, refusals and programs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dials_jax.caching.early_skip.settings import EarlySkip
from dials_jax.caching.plain import DualCache, NoCache, PrefixCache
from dials_jax.errors import InputError
from dials_jax.models.model import Model
from dials_jax.reference import Decoder
from dials_jax.sampling import generate as generating
from dials_jax.sampling.confidence import Confidence
from dials_jax.sampling.generate import generate
from dials_jax.sampling.requests import ALONE, Role
from dials_jax.skipping.policies import Random
from dials_jax.skipping.routed import Routed
from tests.caching.cases import CACHES, PLACES, QUOTA, G, P, keys_of
from tests.conftest import EOS, MASK, random_routers

# Tokens leave early, with few variants to compile.
RARELY_REFRESHED = EarlySkip((1.0, 0.5), (0.0, 0.3), prompt_every=16, block_every=8)

CACHED = ["prefix", "dual", "skip"]

# ---------------------------------------------------------------------------------------- limits

ONE_BLOCK = Confidence(gen_length=8, block_length=8, steps=8)
EVERYTHING = {"proportions": (1.0,), "depths": (0.0,), "prompt_every": 8}


def test_in_one_block_the_limits_of_the_caches_are_each_other(models, prompts):
    def tokens(cache):
        return generate(models["llada"], *prompts, sampler=ONE_BLOCK, cache=cache).tokens

    dual, whole = tokens(DualCache()), tokens(NoCache())
    assert (dual != whole).any()
    np.testing.assert_array_equal(tokens(PrefixCache()), dual)  # nothing comes after the block
    # No token is skipped, so that every step brings the block up to date, or the canvas.
    np.testing.assert_array_equal(tokens(EarlySkip(**EVERYTHING, block_every=8)), dual)
    always = EarlySkip(**EVERYTHING | {"prompt_every": 1}, block_every=1)
    np.testing.assert_array_equal(tokens(always), whole)


# ------------------------------------------------------------------------------------------ cost


WHOLE, BLOCK, BOTH = [P + G] * 4, [8] * 4, [16] * 4
# Tokens are skipped behind layers 1 and 2: half of 8, then a quarter, but never fewer than 3.
SKIP = [8, 8, 4, 3]
RUNS = {
    "prefix": [(WHOLE, 1), (BOTH, 7), (WHOLE, 1), (BLOCK, 7)],
    "dual": [(WHOLE, 1), (BLOCK, 7)] * 2,
    "skip": [
        (WHOLE, 1), (SKIP, 3), (BLOCK, 1), (SKIP, 3),
        (BOTH, 1), (SKIP, 3),  # from the last token on, in two blocks
        (WHOLE, 1), (SKIP, 3),  # the prompt's turn
    ],
}  # fmt: skip


@pytest.mark.parametrize("cache", CACHED)
def test_the_tokens_that_run_are_those_of_the_schedule(models, prompts, policies, cache):
    out = run_quota(models, prompts, policies, cache)
    expected = [tokens for tokens, times in RUNS[cache] for _ in range(times)]
    np.testing.assert_array_equal(out.tokens_run, expected)
    np.testing.assert_allclose(out.masked_share[:, 0], np.arange(G, 0, -1) / G)
    assert out.flops.model < 0.9 * out.flops.layers_run


def layer_by_hand(cfg, num_tokens, num_keys, projected):
    """FLOPs of a layer with as many heads of keys and values as of queries."""
    d, queries, mlp = cfg.d_model, cfg.num_heads * cfg.head_dim, 3 * cfg.d_ff
    to_heads, after = 3 * d * queries, 2 * num_keys * queries + d * (queries + mlp)
    return 2 * (projected * to_heads + num_tokens * after)


def test_tokens_skipped_within_a_layer_have_keys_there(models, prompts):
    """In the layer itself, queries, keys and values are known before a token is skipped."""
    cfg, length = models["llada"].config, P + 8
    sampler, cache = Confidence(8), EarlySkip(**PLACES, block_every=8, indicator="value")
    out = generate(models["llada"], *prompts, sampler=sampler, cache=cache)
    head = 2 * cfg.d_model * cfg.vocab_size
    whole = 4 * layer_by_hand(cfg, length, length, length) + 8 * head
    into, through = [8, 8, 4, 3], [8, 4, 3, 3]
    skip = sum(layer_by_hand(cfg, n, length, m) for m, n in zip(into, through, strict=True))
    assert out.flops.model_total == 3 * (whole + 7 * (skip + 3 * head))


def test_without_a_cache_blocks_that_are_not_there_yet_are_no_keys(models, prompts):
    cfg = models["llada"].config
    sampler = dataclasses.replace(QUOTA, append_blocks=True)
    out = generate(models["llada"], *prompts, sampler=sampler)
    head = 2 * 8 * cfg.d_model * cfg.vocab_size
    first, second = (4 * layer_by_hand(cfg, n, n, n) + head for n in (P + 8, P + 16))
    assert out.flops.model_total == 3 * 8 * (first + second)
    assert out.flops.flops_share == pytest.approx((first + second) / (2 * second))


def run_quota(models, prompts, policies, name, **changes):
    """With the settings of a composition, whose program is there already."""
    settings = {"executor": "compact" if name == "dual" else "select", "key": keys_of(3)}
    settings |= {"sampler": QUOTA, "cache": CACHES[name], "policy": policies["routed"]}
    return generate(models["llada"], *prompts, **settings | changes)


# -------------------------------------------------------------------------------------- programs


@pytest.mark.parametrize("cache", CACHED)
def test_the_same_programs_serve_one_shape(models, prompts, policies, cache):
    out = run_quota(models, prompts, policies, cache)
    before = generating.segment_program.num_programs
    turned = [x[::-1].copy() for x in prompts]
    other = run_quota(models, turned, policies, cache)
    assert generating.segment_program.num_programs == before
    np.testing.assert_array_equal(other.tokens, out.tokens[::-1])
    np.testing.assert_array_equal(other.gates, out.gates[..., ::-1])


@pytest.mark.parametrize("cache", CACHED)
def test_nothing_is_fetched_while_it_runs(models, prompts, policies, cache):
    expected = run_quota(models, prompts, policies, cache).tokens
    model, (tokens, valid) = models["llada"], prompts
    rows = model.place_sequences((jnp.asarray(tokens, jnp.int32), jnp.asarray(valid), keys_of(3)))
    executor = "compact" if cache == "dual" else "select"
    static = {"sampler": QUOTA, "cache": CACHES[cache], "executor": executor}
    policy = jax.device_put(policies["routed"])  # its threshold is an argument, too
    parts = QUOTA.parts(model.config, CACHES[cache], tokens.shape[1])
    turns = [generating.Turn(ALONE, part=part) for part in parts]
    static |= {"log_probs": False, "trajectory": False}
    with jax.transfer_guard("disallow"):
        (out, _), _ = generating.run_in_turns({ALONE: Role(model, policy)}, turns, rows, **static)
    np.testing.assert_array_equal(out, expected)


# ---------------------------------------------------------------------------------- ends of text


@pytest.fixture(scope="module")
def ending(models):
    """A model that ends its texts: end of text takes the part of a token that it likes."""
    model = models["llada"]
    kernel = model.params["head"]["kernel"]
    kernel = kernel.at[:, EOS].set(kernel[:, FAVOURITE]).at[:, FAVOURITE].set(kernel[:, EOS])
    return Model(model.config, {**model.params, "head": {"kernel": kernel}})


FAVOURITE = 62  # after these prompts


@pytest.mark.parametrize("cache", ["dual", "hidden"])
def test_stopping_at_an_end_changes_nothing_before_it(ending, cache):
    tokens = np.random.default_rng(28).integers(2, 60, (2, P))
    valid = np.arange(P) >= np.arange(2)[:, None]
    sampler = dataclasses.replace(QUOTA, stop_at_eos=True)
    out = generate(ending, tokens, valid, cache=CACHES[cache], sampler=sampler)
    for i in range(2):
        decoder = Decoder(ending, tokens[i, valid[i]], QUOTA, CACHES[cache])  # never stops
        decoder.decode()
        whole, part = decoder.tokens[decoder.prompt_length :], out.tokens[i, P:]
        end = np.flatnonzero(whole == EOS)[0]
        np.testing.assert_array_equal(part[: end + 1], whole[: end + 1])
        assert (part[8 * (end // 8 + 1) :] == EOS).all()  # the blocks that follow
    assert not (out.tokens[:, P:] == MASK).any()
    assert out.nfe <= 8


def test_looking_for_an_end_changes_no_step_where_there_is_none(models, prompts):
    """Noise and random gates are folded from the step's number."""
    sampler = dataclasses.replace(QUOTA, temperature=0.6)
    arguments = {"cache": RARELY_REFRESHED, "policy": Random(1), "executor": "select"}
    outs = [
        generate(models["llada"], *prompts, sampler=one, **arguments)
        for one in (sampler, dataclasses.replace(sampler, stop_at_eos=True))
    ]
    assert not (outs[0].tokens[:, P:] == EOS).any()
    np.testing.assert_array_equal(outs[0].steps, outs[1].steps)
    np.testing.assert_array_equal(outs[0].tokens, outs[1].tokens)


def test_routers_look_where_the_account_says(models, prompts):
    """A policy that notes how many tokens it is shown, and from which on it looks."""
    looks = {}

    class Noting(Routed):
        def gate(self, plan, h, denoising):
            looks[name].add(h.shape[1] - denoising.prompt_length)
            return super().gate(plan, h, denoising)

    model = models["llada"]
    jax.tree_util.register_dataclass(Noting, ["router", "threshold"], ["votes"])
    for name, cache in {"none": NoCache(), "skip": RARELY_REFRESHED}.items():
        looks[name] = set()
        policy = Noting(random_routers(model.config))
        generate(model, *prompts, sampler=QUOTA, cache=cache, policy=policy, executor="select")
    assert max(looks["none"]) == max(looks["skip"]) == G


# --------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("cache", ["none", "prefix", "dual", "hidden"])
def test_a_shifted_model_needs_a_token_to_begin_with(models, prompts, cache):
    tokens, valid = prompts
    valid = valid & (np.arange(3) != 1)[:, None]
    with pytest.raises(InputError, match=r"prompt 1 is empty.*begin it with a token"):
        generate(models["dream"], tokens, valid, sampler=QUOTA, cache=CACHES[cache])
    if cache != "none":
        with pytest.raises(InputError, match="prompt 0 is empty"):
            generate(models["dream"], sampler=QUOTA, cache=CACHES[cache], num_sequences=1)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sampler": dataclasses.replace(QUOTA, cfg_scale=1.0)}, "does not compose with guidance"),
        ({"cache": EarlySkip(**PLACES, block_every=3)}, "block_every=3 must divide block_length=8"),
        ({"cache": EarlySkip(indicator="key")}, "depths=.* fall on layers .*; keep them apart"),
        ({"cache": EarlySkip((1.0, 0.5), (0.0, 0.9))}, "nothing is left to skip behind layer 4"),
        (
            {"cache": EarlySkip(**PLACES, indicator="key")},
            "indicator='key' reads a layer that a policy may skip; use indicator='hidden'",
        ),
    ],
)
def test_what_does_not_compose_is_refused(models, prompts, policies, changes, message):
    with pytest.raises(InputError, match=message) as info:
        run_quota(models, prompts, policies, "skip", **changes)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"proportions": (1.0, 0.5)}, "2 proportions for 3 depths"),
        ({"proportions": (0.9, 0.5, 0.25)}, "begin with 1 at depth 0"),
        ({"depths": (0.1, 0.2, 0.3)}, "begin with 1 at depth 0"),
        ({"proportions": (1.0, 0.5, 0.5)}, "must fall"),
        ({"depths": (0.0, 0.5, 1.0)}, "must fall .* rise, within"),
        ({"alpha": 1.5}, r"alpha=1.5 must lie in \[0, 1\]"),
        ({"prompt_every": 0}, "prompt_every=0 must be positive"),
    ],
)
def test_wrong_settings_of_early_skip_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        EarlySkip(**changes)
