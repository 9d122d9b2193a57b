"""Schedules as text, and models that take turns."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dials_jax.caching.plain import DualCache, NoCache
from dials_jax.errors import InputError
from dials_jax.models.model import Model
from dials_jax.sampling import generate as generating
from dials_jax.sampling.ancestral import Ancestral
from dials_jax.sampling.autoregressive import Autoregressive
from dials_jax.sampling.confidence import Confidence
from dials_jax.sampling.dream import Dream
from dials_jax.sampling.generate import generate
from dials_jax.sampling.model_schedule import Schedule
from dials_jax.skipping.policies import Static
from tests.conftest import amplify, init_params

STEPS = Ancestral(16, 12)
BLOCKS = Confidence(gen_length=16, block_length=8, steps=8)
THRESHOLD = Confidence(gen_length=16, block_length=8, steps=8, threshold=0.5)
EDITING = dataclasses.replace(THRESHOLD, edit_threshold=0.4, max_edit_steps=4)
# Without a prompt, a canvas of [MASK] alone gives each position the same logits: which one is
# surest would be left to rounding. Ancestral sampling has its noise.
PROMPTS = np.random.default_rng(5).integers(2, 60, (3, 5), dtype=np.int32)


@pytest.fixture(scope="module")
def models(lively):
    """A heavy model of four layers and a light one of two."""
    cfg = dataclasses.replace(lively.config, num_layers=2)
    return {"L": Model(cfg, amplify(init_params(cfg, 9), 8)), "H": lively}


def run(models, schedule, sampler=STEPS, prompts=None, **changes):
    return generate(
        models,
        prompts,
        **{"num_sequences": 3, "key": jax.random.key(3)} | changes,
        sampler=sampler,
        schedule=Schedule.parse(schedule),
    )


# ----------------------------------------------------------------------------------------- text


@pytest.mark.parametrize("text", ["L125,H750,L125", "H1", "A3,B4,A3,C90"])
def test_text_comes_back(text):
    assert str(Schedule.parse(text)) == text
    assert Schedule.parse(f" {text.replace(',', ' , ')} ") == Schedule.parse(text)
    assert len({Schedule.parse(text), Schedule.parse(text)}) == 1


@pytest.mark.parametrize("text", ["", "L", "5", "L5,,H5", "L5 H5", "LL5", "L-5", "L5.5"])
def test_other_text_is_refused(text):
    with pytest.raises(InputError, match=r"is not a letter and a number of steps"):
        Schedule.parse(text)


def test_a_run_of_no_steps_is_refused():
    with pytest.raises(InputError, match="L0: give one letter and a positive number"):
        Schedule.parse("L0,H5")


@pytest.mark.parametrize(
    "schedule, text",
    [
        (Schedule.sandwich(1000, 250), "L125,H750,L125"),
        (Schedule.sandwich(1000, 0.25), "L125,H750,L125"),
        (Schedule.sandwich(1000, np.float32(0.25)), "L125,H750,L125"),
        (Schedule.sandwich(1000, np.int64(250)), "L125,H750,L125"),
        (Schedule.sandwich(10, 3), "L2,H7,L1"),
        (Schedule.sandwich(10, 0.0), "H10"),
        (Schedule.sandwich(10, 1.0), "L10"),
        (Schedule.sandwich(10, 1, light="a", heavy="b"), "a1,b9"),
        (Schedule.quarter(1, 1000), "L250,H750"),
        (Schedule.quarter(3, 1000), "H500,L250,H250"),
        (Schedule.coarse(10, (0, 9, 1, 4), 1000), "L200,H200,L100,H400,L100"),
        (Schedule.of_steps("aabba"), "a2,b2,a1"),
    ],
)
def test_presets(schedule, text):
    assert str(schedule) == text


def test_what_a_schedule_says_of_its_steps():
    schedule = Schedule.parse("L2,H3,H1,L2")
    assert schedule.num_steps == 8 and schedule.letters == ("L", "H")
    assert schedule.each_step == "LLHHHHLL" and schedule.share("L") == 0.5
    assert schedule.ends() == [("L", 2), ("H", 6), ("L", 8)]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Schedule.sandwich(10, 11), "light_steps=11 must lie in 0 to 10"),
        (lambda: Schedule.sandwich(10, 1.5), r"a fraction lies in \[0, 1\]"),
        (lambda: Schedule.quarter(5, 8), "quarter 5 does not exist"),
        (lambda: Schedule.coarse(10, (10,), 100), "segment 10 does not exist"),
        (lambda: Schedule.coarse(10, (1,), 105), "do not split into 10 equal segments"),
    ],
)
def test_presets_that_make_no_sense_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


# ---------------------------------------------------------------------------------------- turns


@pytest.mark.parametrize(
    "sampler, split",
    [
        (STEPS, "A5,B7"),
        (Ancestral(16, 12, precision="float32"), "A5,B7"),
        (BLOCKS, "A3,B5"),
        (THRESHOLD, "A3,B13"),
        (EDITING, "A3,B21"),
        (Dream(16, 8), "A3,B5"),
    ],
    ids=["ancestral", "published", "quota", "threshold", "editing", "dream"],
)
def test_a_schedule_of_one_model_is_the_plain_sampler(lively, sampler, split):
    prompts = None if isinstance(sampler, Ancestral) else PROMPTS
    plain = generate(lively, prompts, sampler=sampler, num_sequences=3)
    one = run({"A": lively}, f"A{Schedule.parse(split).num_steps}", sampler, prompts, key=None)
    two = run({"A": lively, "B": lively}, split, sampler, prompts, key=None)
    for out in (one, two):
        np.testing.assert_array_equal(out.tokens, plain.tokens)
        np.testing.assert_array_equal(out.gates.shape, (out.nfe, *plain.gates.shape[1:]))
    assert one.nfe == plain.nfe
    np.testing.assert_array_equal(one.masked_share, plain.masked_share)


def test_each_model_takes_its_own_steps(models):
    """Against the two models applied by hand, step by step."""
    out = run(models, "L3,H2,L3", BLOCKS, PROMPTS)
    length = PROMPTS.shape[1]
    canvas = np.pad(PROMPTS, ((0, 0), (0, 16)), constant_values=models["H"].config.mask_id)
    for step, letter in enumerate("LLLHHLLL"):
        logits = np.asarray(models[letter].apply(canvas).logits)
        sure = np.asarray(jax.nn.softmax(jnp.asarray(logits))).max(-1)
        block = (np.arange(length + 16) - length) // 8 == step // 4
        sure = np.where((canvas == models["H"].config.mask_id) & block, sure, -1)
        for row in range(len(PROMPTS)):
            best = np.argsort(-sure[row], kind="stable")[:2]
            canvas[row, best] = logits[row, best].argmax(-1)
    np.testing.assert_array_equal(out.tokens, canvas)


def test_schedules_share_programs_and_fetch_nothing(models):
    run(models, "L3,H6,L3")
    before = generating.segment_program.num_programs
    with jax.transfer_guard_device_to_host("disallow"):
        rows = models["H"].place_sequences(
            (jnp.zeros((3, 0), jnp.int32), None, jax.random.split(jax.random.key(0), 3))
        )
        roles = {letter: generating.Role(model, None) for letter, model in models.items()}
        static = {"sampler": STEPS, "cache": NoCache(), "executor": "auto"}
        static |= {"log_probs": False, "trajectory": False}
        for text in ("L3,H6,L3", "H2,L5,H2,L1,H2", "H11,L1"):
            generating.run_schedule(roles, Schedule.parse(text), rows, **static)
    assert generating.segment_program.num_programs == before


def test_costs_of_a_schedule(models):
    out = run(models, "L3,H9")
    light = out.steps < 3
    assert 0 < light.sum() < out.nfe == len(out.steps)
    assert out.gates[~light].all() and out.gates[light, :2].all()
    assert not out.gates[light, 2:].any() and not out.tokens_run[light, 2:].any()
    own = out.own.sum(axis=1)  # how many sequences needed a call
    saved = own[light].sum() / own.sum() * (4 - 2) / 4  # Sedykh et al.: p (B_H - B_L) / B_H
    assert out.flops.layers_run == pytest.approx(1 - saved)
    # The head is the same in both, and so the whole saves less.
    assert 1 - saved < out.flops.model < 1
    assert run(models, "H12").flops.model == 1
    assert run(models, "L12").flops.layers_run == 0.5


def test_models_may_skip_layers_of_their_own(models):
    out = run(models, "L3,H9", policy={"H": Static((1, 3))})
    light = out.steps < 3
    assert out.gates[light, :2].all() and not out.gates[~light][:, [1, 3]].any()
    both = run(models, "L3,H9", policy=Static((1,)))
    assert not both.gates[:, 1].any() and both.gates[:, 0].all()


def test_a_cache_may_serve_one_model_of_several(models):
    plain = generate(models["H"], PROMPTS, sampler=BLOCKS, cache=DualCache())
    out = run(models, "H8", BLOCKS, PROMPTS, cache=DualCache(), key=None)
    np.testing.assert_array_equal(out.tokens, plain.tokens)
    with pytest.raises(InputError, match="a cache holds one model's keys and values"):
        run(models, "L4,H4", BLOCKS, cache=DualCache())


# ------------------------------------------------------------------------------------- refusals


def changed(model, **changes):
    cfg = dataclasses.replace(model.config, **changes)
    return Model(cfg, init_params(cfg))


@pytest.mark.parametrize(
    "schedule, sampler, changes, message",
    [
        ("L5,H5", STEPS, {}, "schedule L5,H5 has 10 steps and the sampler 12"),
        ("L5,X7", STEPS, {}, "schedule L5,X7: no model is called 'X'; valid names: H, L"),
        ("L5,H7", STEPS, {"policy": {"X": None}}, "policy: no model is called 'X'"),
        ("L5,H7", Autoregressive(12), {}, "is for causal models"),
    ],
)
def test_schedules_that_do_not_fit_are_refused(models, schedule, sampler, changes, message):
    with pytest.raises(InputError, match=message):
        run(models, schedule, sampler, **changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"vocab_size": 70}, "models L and H have vocab_size 70 and 64"),
        ({"mask_id": 62}, "models L and H have mask_id 62 and 63"),
        ({"max_length": 8}, "the model has 8 positions"),
    ],
)
def test_models_that_do_not_go_together_are_refused(models, changes, message):
    with pytest.raises(InputError, match=message):
        run({"L": changed(models["L"], **changes), "H": models["H"]}, "L6,H6")


@pytest.mark.parametrize("letter", ["M", "A"])
def test_no_letter_escapes_the_checks(lively, letter):
    for steps in (2, 13):
        with pytest.raises(InputError, match=f"schedule {letter}{steps} has {steps} steps and"):
            run({letter: lively}, f"{letter}{steps}")


def test_a_schedule_is_no_text(models, untyped):
    with pytest.raises(InputError, match="schedule='H12' must be a Schedule or None"):
        generate(models, num_sequences=1, sampler=STEPS, schedule="H12")


def test_letters_and_a_schedule_come_together(models, lively):
    with pytest.raises(InputError, match="a schedule names models by letter"):
        generate(models, num_sequences=1, sampler=STEPS)
    with pytest.raises(InputError, match="a schedule names models by letter"):
        generate(lively, num_sequences=1, sampler=STEPS, schedule=Schedule.parse("H12"))
