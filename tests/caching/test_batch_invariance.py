"""In the batch-invariant mode a sequence is bitwise what it is alone: tokens, logits and gates."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.extend.core.primitives import convert_element_type_p

from dials_jax.caching.early_skip.settings import EarlySkip
from dials_jax.caching.plain import DualCache, NoCache, PrefixCache
from dials_jax.compiling import Timed, batch_invariant
from dials_jax.errors import InputError
from dials_jax.evaluation.confidence_likelihood import confidence_scores
from dials_jax.evaluation.full_depth import kl_program
from dials_jax.evaluation.likelihood import score_pairs
from dials_jax.evaluation.pairs import align_pairs, pad_pairs
from dials_jax.loading import load
from dials_jax.models import invariance
from dials_jax.models.folders import save_model
from dials_jax.models.model import Model
from dials_jax.sampling.ancestral import Ancestral
from dials_jax.sampling.confidence import Confidence
from dials_jax.sampling.dream import Dream
from dials_jax.sampling.generate import generate
from dials_jax.sampling.infill import infill
from dials_jax.sampling.model_schedule import Schedule
from dials_jax.sampling.requests import check_schedule, roles_of
from dials_jax.skipping.policies import Static
from dials_jax.skipping.routed import Routed
from tests.caching.cases import keys_of, make_lively
from tests.conftest import init_params, random_routers, small_config

CFG = small_config(num_layers=3, d_model=64)
PROMPTS = [[5, 9, 33, 7, 40], [8, 3], [20, 21, 22, 23, 24, 25, 26]]
SAMPLER = Confidence(gen_length=8, block_length=4, steps=8, temperature=0.5)


def lively(batch_invariant=True):
    made = make_lively(CFG, 0)
    return Model(CFG, made.params, made.mesh, batch_invariant=batch_invariant)


CACHES = {
    "none": NoCache(),
    "prefix": PrefixCache(),
    "dual": DualCache(),
    "ES-dLLM": EarlySkip((1.0, 0.5), (0.0, 0.3), prompt_every=6, block_every=2),
}
HALF = {"dtype": "bfloat16"}
MODEL = lively()
ROUTED = Routed(random_routers(CFG, seed=7), 0.1)


@pytest.fixture(autouse=True, scope="module")
def sums_have_one_order():
    """On a GPU XLA chooses the order of a sum by the shape of the whole array; on a CPU a test of
    values would not see it. So no program of this file, in the mode, may leave a sum to XLA."""
    lower = Timed.lower

    def lower_checked(timed, *args, **kwargs):
        traced = timed.trace(*args, **kwargs)
        if batch_invariant.value:
            assert not list(float_sums(traced.jaxpr.jaxpr)), timed.__name__
        return traced.lower()

    with mock.patch.object(Timed, "lower", lower_checked):
        yield
    assert Timed.lower is lower


def float_sums(jaxpr):
    """Where a program leaves it to XLA in which order floats are added up along an axis.

    The order changes nothing where each is 0 or 1, nor where all but one are 0.
    """
    made_by = {out: equation for equation in jaxpr.eqns for out in equation.outvars}
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("reduce_sum", "reduce_window_sum"):
            (x,) = equation.invars
            terms = x
            while getattr(made_by.get(terms), "primitive", None) is convert_element_type_p:
                (terms,) = made_by[terms].invars
            counts = terms.aval.dtype == bool
            callers = {f.function_name for f in equation.source_info.traceback.frames}
            exact = counts or "masked_log_probs" in callers
            if jnp.issubdtype(x.aval.dtype, jnp.floating) and not exact:
                yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from float_sums(inner)


def differing(model, cache, policy):
    """How many numbers differ between sequences in a batch of all and each of two alone."""
    how = {"sampler": SAMPLER, "cache": CACHES[cache], "policy": policy, "trajectory": True}
    together = generate(model, PROMPTS, key=keys_of(3), **how)
    # Without what is padded to a whole tile.
    np.testing.assert_array_equal(together.trajectory.tokens[-1], together.tokens)
    count = 0
    for i in (0, 1):
        alone = generate(model, PROMPTS[i : i + 1], key=keys_of(3)[i : i + 1], **how)
        length = alone.tokens.shape[1]
        np.testing.assert_array_equal(alone.gates[..., 0], together.gates[..., i])
        count += np.sum(alone.tokens[0] != together.tokens[i, -length:])
        count += np.sum(alone.log_probs[0] != together.log_probs[i])
    return count, together


@pytest.mark.parametrize("cache", CACHES)
def test_a_sequence_is_what_it_is_alone_under_routers_that_disagree(cache):
    count, together = differing(MODEL, cache, ROUTED)
    assert count == 0
    gates = together.gates
    assert (gates != gates[..., :1]).any() and not gates.all()  # they skip different layers


def test_a_sequence_is_what_it_is_alone_with_all_layers():
    assert differing(MODEL, "dual", None)[0] == 0


def test_logits_are_the_same_in_batches_of_every_size():
    tokens = np.random.default_rng(0).integers(2, 60, (8, 9))
    together = MODEL.apply(tokens).logits
    for rows in (slice(0, 1), slice(1, 3), slice(3, 8)):
        np.testing.assert_array_equal(MODEL.apply(tokens[rows]).logits, together[rows])
    by_default = lively(batch_invariant=False).apply(tokens).logits
    np.testing.assert_allclose(together, by_default, rtol=1e-3, atol=1e-4)


def test_likelihoods_are_the_same_in_batches_of_every_size_and_length():
    pairs = [(p, [11, 12, 13][: 1 + i]) for i, p in enumerate(long_texts(41, 27, 12))]

    def scores(some):
        own = pad_pairs([pairs[i] for i in some], CFG)
        numbers = np.zeros(len(some), int)
        found, _ = score_pairs(MODEL, own, keys_of(3)[np.asarray(some)], numbers, stratum=1)
        return found.log_likelihood

    together = scores([0, 1, 2])
    np.testing.assert_array_equal(scores([1]), together[1:2])
    np.testing.assert_array_equal(scores([2, 0]), together[[2, 0]])


def long_texts(*lengths):
    """Of more than one tile of keys, and at other places in it."""
    rng = np.random.default_rng(0)
    return [rng.integers(2, 60, length).tolist() for length in lengths]


def test_masks_inside_a_text_are_filled_as_alone():
    texts = [
        [CFG.mask_id if i % 4 == 3 else x for i, x in enumerate(text)]
        for text in long_texts(33, 20, 4)
    ]
    together = infill(MODEL, texts, key=keys_of(3), trajectory=True)
    np.testing.assert_array_equal(together.trajectory.tokens[-1], together.tokens)
    for i in (1, 2):
        alone = infill(MODEL, texts[i : i + 1], key=keys_of(3)[i : i + 1], log_probs=True)
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[i, -len(texts[i]) :])
        width = alone.log_probs.shape[1]
        np.testing.assert_array_equal(alone.log_probs[0], together.log_probs[i, -width:])


def test_likelihoods_by_confidence_are_the_same_in_batches_of_every_length():
    pairs = [(prompt, [11, 12, 13]) for prompt in long_texts(41, 27, 12)]
    together = confidence_scores(MODEL, pairs, append_eos=True).log_likelihood
    for i in (1, 2):
        alone = confidence_scores(MODEL, pairs[i : i + 1], append_eos=True).log_likelihood
        np.testing.assert_array_equal(alone, together[i : i + 1])


@pytest.mark.parametrize(
    "backend, hopper, changes, message",
    [
        ("tpu", False, {}, "needs a CPU, or Hopper GPUs"),
        ("gpu", False, {}, "needs a CPU, or Hopper GPUs"),
        ("cpu", False, {"block_length": 4}, "block-causal"),
        ("gpu", True, {}, "no kernels for float32"),
        ("gpu", True, HALF, "heads of 128"),
        ("gpu", True, HALF | {"head_dim": 128, "d_model": 128, "causal": True}, "bidirectional"),
    ],
)
def test_where_the_mode_cannot_hold_one_line_says_so(
    backend, hopper, changes, message, monkeypatch
):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(invariance, "on_hopper", lambda: hopper)
    with pytest.raises(InputError, match=message) as error:
        invariance.require_invariant(small_config(**changes), MODEL.mesh)
    assert "\n" not in str(error.value)


def test_the_refusal_comes_before_weights_are_read(tmp_path, monkeypatch):
    save_model(tmp_path / "model", CFG, init_params(CFG))
    assert load(tmp_path / "model", batch_invariant=True).batch_invariant
    for file in (tmp_path / "model" / "params").rglob("*"):
        if file.is_file():
            file.unlink()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(InputError, match="batch_invariant=True needs"):
        load(tmp_path / "model", batch_invariant=True)


def test_models_of_a_schedule_are_all_of_the_mode_or_none():
    models = {"H": MODEL, "L": lively(batch_invariant=False)}
    schedule = Schedule.parse("L4,H4")
    with pytest.raises(InputError, match="one is batch-invariant"):
        check_schedule(roles_of(models, schedule, None), schedule, SAMPLER, CACHES["none"])


def test_the_kl_to_full_depth_is_the_same_in_batches_of_every_length():
    policy = Static((1,))
    pairs = [(p, [11, 12, 13][: 1 + i]) for i, p in enumerate(long_texts(41, 27, 12))]

    def kl(some):
        own = align_pairs(MODEL, pad_pairs([pairs[i] for i in some], CFG))
        placed = MODEL.place_sequences(
            (own, keys_of(3)[np.asarray(some)], np.zeros(len(some), int))
        )
        return MODEL.run(kl_program, *placed, policy)[0]

    together = kl([0, 1, 2])
    np.testing.assert_array_equal(kl([1]), together[1:2])
    assert (together > 0).all()


@pytest.mark.parametrize(
    "sampler",
    [
        Ancestral(4, 4),
        Ancestral(4, 4, precision="float32"),
        Dream(4, 4, top_p=0.9, temperature=0.5),
    ],
)
def test_other_samplers_draw_for_a_sequence_as_alone(sampler):
    together = generate(MODEL, PROMPTS, key=keys_of(3), sampler=sampler)
    alone = generate(MODEL, PROMPTS[1:2], key=keys_of(3)[1:2], sampler=sampler)
    np.testing.assert_array_equal(alone.tokens[0], together.tokens[1, -alone.tokens.shape[1] :])
