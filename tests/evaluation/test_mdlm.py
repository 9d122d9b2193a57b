"""What a model that never says [MASK], and one that is told the time, are scored and sampled by."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dials_jax.diffusion.subs import subs_log_probs
from dials_jax.errors import InputError
from dials_jax.evaluation.likelihood import estimate_log_likelihood
from dials_jax.models import families
from dials_jax.models.model import Model
from dials_jax.sampling.confidence import Confidence
from dials_jax.sampling.generate import generate
from tests.conftest import init_params

MASK, PROMPT = 18, 2
TOKENS = np.array([[3, 4, 5, 6, 7, 8]])
NOISY = np.where([False, False, True, False, True, True], MASK, TOKENS)


def make(time_conditioning=False, loud_mask=0.0):
    """A random model in which every layer and the time matter."""
    cfg = families.mdlm_small(
        2, 32, 19, mask_id=MASK, eos_id=1, pad_id=0, max_length=16, dtype="float32", cond_dim=8,
        time_conditioning=time_conditioning,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: x + 0.3 * rng.normal(size=x.shape).astype(np.float32), init_params(cfg, 1)
    )
    bias = params["head"]["bias"] + loud_mask * (np.arange(19) == MASK).astype(np.float32)
    return Model(cfg, {**params, "head": {**params["head"], "bias": bias}})


@pytest.mark.parametrize("time_conditioning", [False, True])
def test_likelihood_is_that_of_subs_at_the_masked_share(time_conditioning):
    model, p_mask = make(time_conditioning, loud_mask=3.0), np.full((1, 6), 0.75)
    value = estimate_log_likelihood(model, TOKENS, NOISY, p_mask, prompt_len=PROMPT)
    logits = model.apply(NOISY, time=0.75).logits
    log_p = subs_log_probs(logits, jnp.asarray(NOISY), MASK)[0]
    log_p = np.asarray(log_p)
    expected = sum(log_p[i, TOKENS[0, i]] for i in (2, 4, 5)) / 0.75
    assert value == pytest.approx(expected, rel=1e-4)
    plain = np.asarray(jax.nn.log_softmax(logits[0]))  # with [MASK] among the predictions
    assert abs(sum(plain[i, TOKENS[0, i]] for i in (2, 4, 5)) / 0.75 - expected) > 1e-3


def test_the_logit_of_mask_changes_no_sample():
    sampler = Confidence(gen_length=8, block_length=4, steps=4, temperature=0.7)
    quiet, loud = (
        generate(make(loud_mask=x), TOKENS[:, :2], sampler=sampler).tokens for x in (-50.0, 50.0)
    )
    np.testing.assert_array_equal(quiet, loud)
    assert not (loud == MASK).any()


def test_samplers_without_a_time_refuse_models_that_need_one():
    sampler = Confidence(gen_length=8, block_length=4, steps=4)
    with pytest.raises(InputError, match=r"Confidence has no denoising time.*Ancestral"):
        generate(make(time_conditioning=True), TOKENS, sampler=sampler)


def test_every_diffusion_preset_of_mdlm_uses_subs_and_no_causal_one():
    assert families.mdlm(4).subs and not families.mdlm(4, causal=True).subs
