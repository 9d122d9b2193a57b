import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dials_jax.caching.plain import NoCache
from dials_jax.diffusion.guidance import guide
from dials_jax.errors import InputError
from dials_jax.loading import load
from dials_jax.sampling import generate as generating
from dials_jax.sampling.confidence import Confidence
from dials_jax.sampling.generate import generate
from dials_jax.skipping.policies import Random, Static
from dials_jax.skipping.routed import Routed
from tests.conftest import MASK, random_routers

GOLDEN = Path(__file__).parents[1] / "golden" / "llada_tiny"
P = 6
SAMPLER = Confidence(gen_length=8, block_length=4, steps=4)
WARM = Confidence(gen_length=8, block_length=4, steps=4, temperature=0.7)
GUIDED = Confidence(gen_length=8, block_length=4, steps=4, cfg_scale=1.0)
EDITED = Confidence(
    8, 4, temperature=0.5, cfg_scale=0.5, entropy_bound=1.0, edit_threshold=0.2, max_edit_steps=4
)


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN / "golden.npz")


@pytest.fixture(scope="module")
def golden_model():
    return load(GOLDEN)


@pytest.fixture(scope="module")
def prompts():
    """Three rows, padded on the left by 0, 1 and 2."""
    tokens = np.random.default_rng(0).integers(2, 60, (3, P))
    return tokens, np.arange(P) >= np.arange(3)[:, None]


@pytest.fixture(scope="module")
def policies(routers):
    return {"routed": Routed(routers, 0.3), "random": Random(2)}


def keys_of(num_sequences):
    return jax.random.split(jax.random.key(7), num_sequences)


@pytest.mark.parametrize("name", ["0", "1", "2", "3", "cfg"])
def test_published_code_generates_the_same_tokens(golden, golden_model, name):
    settings = json.loads(str(golden[f"generate_{name}_args"]))
    out = generate(golden_model, golden["prompt"], sampler=Confidence(**settings))
    np.testing.assert_array_equal(out.tokens, golden[f"generate_{name}"])
    assert out.nfe == settings["steps"]


@pytest.mark.parametrize("sampler, kind", [(SAMPLER, "routed"), (WARM, "random")])
def test_a_row_alone_equals_the_row_in_a_padded_batch(lively, prompts, policies, sampler, kind):
    tokens, valid = prompts
    settings = {"sampler": sampler, "policy": policies[kind]}
    batch = generate(lively, tokens, valid, **settings, key=keys_of(3))
    assert batch.gates.any() and not batch.gates.all()
    alone = generate(lively, tokens[2:, 2:], **settings, key=keys_of(3)[2:])
    np.testing.assert_array_equal(alone.tokens[0], batch.tokens[2, 2:])
    np.testing.assert_array_equal(alone.gates[..., 0], batch.gates[..., 2])


def test_a_row_is_edited_alone_as_in_a_batch(lively, prompts, policies):
    """Under guidance and with noise; rows of the batch take different numbers of calls."""
    tokens, valid = prompts
    settings = {"sampler": EDITED, "policy": policies["routed"]}
    batch = generate(lively, tokens, valid, **settings, key=keys_of(3))
    assert len(set(batch.passes)) > 1 and batch.passes.max() > 8  # more calls than tokens
    alone = generate(lively, tokens[2:, 2:], **settings, key=keys_of(3)[2:])
    np.testing.assert_array_equal(alone.tokens[0], batch.tokens[2, 2:])
    assert alone.passes == batch.passes[2] == alone.nfe
    own = batch.gates[batch.own[:, 2]]
    np.testing.assert_array_equal(alone.gates, own[..., [2, 5]])


@pytest.mark.parametrize("sampler", [SAMPLER, WARM, GUIDED])
def test_prompts_stay_and_no_mask_is_left(lively, prompts, sampler):
    tokens, valid = prompts
    out = generate(lively, tokens, valid, sampler=sampler)
    np.testing.assert_array_equal(out.tokens[:, :P], tokens)
    assert not (out.tokens == lively.config.mask_id).any()
    np.testing.assert_allclose(out.masked_share[:, 0], [1, 0.75, 0.5, 0.25])


def test_results_follow_the_key(lively, prompts):
    def tokens(key):
        return generate(lively, *prompts, sampler=WARM, key=key).tokens

    np.testing.assert_array_equal(tokens(jax.random.key(1)), tokens(jax.random.key(1)))
    assert (tokens(jax.random.key(1)) != tokens(jax.random.key(2))).any()
    np.testing.assert_array_equal(tokens(None), tokens(jax.random.key(0)))


def test_gates_and_costs_of_a_static_policy(lively, prompts):
    full = generate(lively, *prompts, sampler=SAMPLER)
    assert full.gates.shape == (4, 4, 3) and full.gates.all()
    assert full.flops.layers_run == full.flops.model == 1
    out = generate(lively, *prompts, sampler=SAMPLER, policy=Static((1,)))
    assert not out.gates[:, 1].any() and out.gates[:, [0, 2, 3]].all()
    assert out.flops.layers_run == 0.75 < out.flops.model < 1
    assert out.flops.model_total == pytest.approx(out.flops.model * full.flops.model_total)


def test_guidance_doubles_the_rows_and_each_half_decides_alone(lively, prompts, policies):
    tokens, valid = prompts
    policy, select = policies["routed"], {"executor": "select"}
    out = generate(lively, tokens, valid, sampler=GUIDED, policy=policy, **select)
    assert out.gates.shape == (4, 4, 6) and out.masked_share.shape == (4, 6)
    assert out.tokens.shape == (3, P + 8)
    # The second half is the model without the prompt, at the first step a canvas of masks.
    blank = np.full((3, P + 8), lively.config.mask_id)
    present = np.concatenate([valid, np.ones((3, 8), bool)], axis=1)
    first = lively.apply(blank, present, policy, **select)
    np.testing.assert_array_equal(out.gates[0, :, 3:], first.gates)
    blank[:, :P] = tokens
    first = lively.apply(blank, present, policy, **select)
    np.testing.assert_array_equal(out.gates[0, :, :3], first.gates)
    assert (out.gates[..., :3] != out.gates[..., 3:]).any()


def test_padding_never_votes(lively, routers):
    """Not even if it holds [MASK]. Under guidance, policies look at the whole canvas."""
    tokens = np.random.default_rng(0).integers(2, 60, (8, 4))
    padded = np.concatenate([np.full((8, 4), MASK), tokens], axis=1)
    settings = {
        "sampler": Confidence(2, 2, 1, cfg_scale=1.0), "policy": Routed(routers, 0.4),
        "key": keys_of(8), "executor": "select",
    }  # fmt: skip
    alone = generate(lively, tokens, np.ones((8, 4), bool), **settings)
    found = generate(lively, padded, np.tile(np.arange(8) >= 4, (8, 1)), **settings)
    np.testing.assert_array_equal(found.gates, alone.gates)
    np.testing.assert_array_equal(found.tokens[:, 4:], alone.tokens)
    assert alone.gates.any() and not alone.gates.all()


def test_guidance_by_hand():
    # u + (w + 1)(c - u) with c = 2, u = 1, w = 0.5: 1 + 1.5 = 2.5.
    logits = jnp.array([[[2.0]], [[1.0]]])
    np.testing.assert_allclose(guide(logits, 0.5), [[[2.5]]])


def test_random_layers_change_from_step_to_step(lively, prompts):
    out = generate(lively, *prompts, sampler=SAMPLER, policy=Random(2))
    assert ((~out.gates).sum(axis=1) == 2).all()
    assert len({gates.tobytes() for gates in out.gates}) > 1


def test_one_program_serves_one_shape(lively, prompts, traced_once):
    traced_once(generating, "generate_program")
    tokens, valid = prompts
    generate(lively, tokens, valid, sampler=SAMPLER)
    before = generating.generate_program.num_programs
    other = tokens[::-1].copy(), valid[::-1].copy()
    generate(lively, *other, sampler=SAMPLER, key=jax.random.key(3))
    assert generating.generate_program.num_programs == before
    generate(lively, tokens[:2], valid[:2], sampler=SAMPLER, fill_to=3)
    assert generating.generate_program.num_programs == before


@pytest.mark.parametrize("sampler", [SAMPLER, GUIDED])
def test_filling_up_a_batch_changes_no_row(lively, prompts, sampler):
    settings = {"sampler": sampler, "policy": Random(1), "executor": "select"}
    tokens, valid = prompts
    batch = generate(lively, tokens, valid, **settings, key=keys_of(3))
    part = generate(lively, tokens[:2], valid[:2], **settings, key=keys_of(3)[:2], fill_to=3)
    np.testing.assert_array_equal(part.tokens, batch.tokens[:2])
    kept = np.arange(6 if sampler is GUIDED else 3) % 3 < 2  # in both halves
    np.testing.assert_array_equal(part.gates, batch.gates[..., kept])
    assert part.masked_share.shape == (4, kept.sum())


def test_nothing_is_fetched_while_it_runs(lively, prompts):
    tokens, valid = prompts
    rows = lively.place_sequences((jnp.asarray(tokens, jnp.int32), jnp.asarray(valid), keys_of(3)))
    program = generating.generate_program
    static = {"sampler": SAMPLER, "cache": NoCache(), "executor": "auto"}
    lively.run(program, *rows, None, **static)  # compiles
    with jax.transfer_guard("disallow"):
        (out, _), _ = lively.run(program, *rows, None, **static)
    assert not (out[:, P:] == lively.config.mask_id).any()


# --------------------------------------------------------------------------------------- refusals


def test_a_prompt_with_masks_is_refused(lively, prompts):
    tokens = prompts[0].copy()
    tokens[2, 1] = lively.config.mask_id
    with pytest.raises(InputError, match=r"prompt 2 contains \[MASK\]"):
        generate(lively, tokens, sampler=SAMPLER)


def test_padding_may_hold_anything(lively, prompts):
    tokens, valid = prompts
    expected = generate(lively, tokens, valid, sampler=SAMPLER).tokens
    for filler in (lively.config.mask_id, lively.config.pad_id):
        out = generate(lively, np.where(valid, tokens, filler), valid, sampler=SAMPLER)
        np.testing.assert_array_equal(out.tokens[:, P:], expected[:, P:])


def test_where_prompts_are_may_be_said_in_numbers_or_lists(lively, prompts, untyped):
    tokens, valid = prompts
    expected = generate(lively, tokens, valid, sampler=SAMPLER).tokens
    for same in (valid.astype(int), valid.tolist()):
        found = generate(lively, tokens, same, sampler=SAMPLER).tokens
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(
            lively.apply(tokens, same).logits, lively.apply(tokens, valid).logits
        )


def test_padding_on_the_right_is_refused(lively, prompts):
    tokens, valid = prompts
    with pytest.raises(InputError, match="padded on the left"):
        generate(lively, tokens, valid[:, ::-1].copy(), sampler=SAMPLER)


def test_too_many_tokens_are_refused(lively):
    with pytest.raises(InputError, match="60 prompt tokens and gen_length=8 make 68"):
        generate(lively, np.full((1, 60), 5), sampler=SAMPLER)


def test_tokens_outside_the_vocabulary_are_refused(lively, prompts):
    tokens = prompts[0].copy()
    tokens[1, 4] = 64
    with pytest.raises(InputError, match=r"prompt 1 .* 64, outside the vocabulary"):
        generate(lively, tokens, sampler=SAMPLER)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"key": 0}, "make it with that"),
        ({"key": [jax.random.key(0)]}, "make it with that"),
        ({"prompts": np.zeros((0, 4), int)}, "there are no prompts"),
        ({"prompts": []}, "there are no prompts; give at least one"),
        ({"prompts": [[3, 4], [5]], "valid": [[1, 1], [1, 0]]}, "prompts differ in length; pad"),
        ({"prompts": [[3, 4], [[5]]]}, "prompts differ in length; pad them on the left"),
        ({"prompts": [[3, 4], ["s"]]}, "prompts are of <U1; give token ids"),
        ({"prompts": [[3, 4], [True]]}, "prompts are of bool; give token ids"),
        ({"prompts": [[3.5, 4.0]]}, "prompts are of float64; give token ids"),
        ({"prompts": [["s37="]]}, "prompts are of <U4; give token ids"),
        ({"fill_to": 0}, "fill_to=0 must be positive"),
        ({"cache": "dual"}, "cache='dual' is no cache; give one, as DualCache()"),
        ({"cache": NoCache}, "is no cache; give one"),
        ({"sampler": "confidence"}, "sampler='confidence' is no sampler; give one"),
        ({"sampler": Confidence}, "is no sampler; give one, as Confidence(gen_length=128)"),
        ({"policy": "full"}, "policy='full' is no policy; give None, or one as Static((7, 9))"),
        ({"policy": Random}, "is no policy; give None"),
        ({"policy": 3}, "policy=3 is no policy"),
        ({"model": "runs/demo"}, "model='runs/demo' is no model; give what `load` returns"),
        ({"executor": "compct"}, "executor='compct' is not known; did you mean 'compact'"),
    ],
)
def test_what_is_no_such_thing_is_refused(lively, prompts, changes, message, untyped):
    arguments = {"model": lively, "prompts": prompts[0], "sampler": SAMPLER} | changes
    with pytest.raises(InputError, match=re.escape(message)):
        generate(**arguments)


def test_a_policy_that_is_one_is_never_printed(lively, prompts, monkeypatch):
    """Its text would fetch the weights of routers."""
    monkeypatch.setattr(Static, "__repr__", None)
    assert generate(lively, prompts[0], sampler=SAMPLER, policy=Static((1,))).nfe > 0


def test_routers_of_another_width_are_refused(lively, prompts):
    wide = random_routers(dataclasses.replace(lively.config, d_model=2 * lively.config.d_model))
    with pytest.raises(InputError, match="the router is of width"):
        generate(lively, prompts[0], sampler=SAMPLER, policy=Routed(wide))


def test_lists_of_any_lengths_are_padded_on_the_left(lively):
    ragged = [[5, 9, 11], [], np.array([7])]
    out = generate(lively, ragged, sampler=SAMPLER)
    padded = np.array([[5, 9, 11], [0, 0, 0], [0, 0, 7]])
    valid = np.array([[1, 1, 1], [0, 0, 0], [0, 0, 1]], bool)
    np.testing.assert_array_equal(
        out.tokens, generate(lively, padded, valid, sampler=SAMPLER).tokens
    )
    np.testing.assert_array_equal(out.tokens[:, :3], padded)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prompts": np.array(5)}, r"prompts have shape \(\); give \[batch, length\]"),
        ({"prompts": [[2**32 + 5], [1, 2]]}, "prompt 0 has token 4294967301, outside"),
        ({"key": jax.random.split(jax.random.key(0), (1, 1))}, r"keys have shape \(1, 1\)"),
    ],
)
def test_prompts_and_keys_of_other_shapes_or_sizes_are_refused(lively, untyped, changes, message):
    arguments = {"prompts": [[5, 9]], "sampler": SAMPLER} | changes
    with pytest.raises(InputError, match=message):
        generate(lively, arguments.pop("prompts"), **arguments)
