"""LLaDA-Instruct and LLaDA-1.5: the authors' tokens with their flags for the end of text."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from dials_jax.caching.plain import DualCache
from dials_jax.loading import load
from dials_jax.models.model import Model
from dials_jax.sampling.confidence import Confidence
from dials_jax.sampling.generate import generate
from dials_jax.skipping.policies import Static
from dials_jax.skipping.routed import Routed
from tests.conftest import random_routers

GOLDEN = Path(__file__).parents[1] / "golden" / "llada_instruct_tiny"


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN / "golden.npz")


@pytest.fixture(scope="module")
def instruct(golden):
    """The converter knows the end of turn of the published tokenizer only."""
    model, args = load(GOLDEN), json.loads(str(golden["generate_0_args"]))
    assert (model.config.mask_id, model.config.eos_id) == (args["mask_id"], args["eos_id"])
    return Model(dataclasses.replace(model.config, eot_id=args["eot_id"]), model.params)


def sampler_of(golden, name):
    args = json.loads(str(golden[f"{name}_args"]))
    return Confidence(**{k: v for k, v in args.items() if not k.endswith("_id")})


def test_logits_are_those_of_the_authors_code_with_padding(golden, instruct):
    valid = golden["attention_mask"].astype(bool)
    logits = np.asarray(instruct.apply(golden["input_ids"], valid).logits)
    np.testing.assert_allclose(logits[valid], golden["logits"][valid], rtol=0, atol=2e-4)
    for row, pads in enumerate(golden["left_pads"]):
        alone = golden[f"unpadded_logits_{row}"]
        np.testing.assert_allclose(logits[row, pads:], alone, rtol=0, atol=2e-4)


@pytest.mark.parametrize("number", range(4))
def test_tokens_are_those_of_the_authors_code(golden, instruct, number):
    sampler = sampler_of(golden, f"generate_{number}")
    out = generate(instruct, golden["prompt"], sampler=sampler)
    np.testing.assert_array_equal(out.tokens, golden[f"generate_{number}"])
    assert out.nfe == sampler.steps


@pytest.mark.parametrize("number", range(2))
def test_tokens_of_a_padded_batch_are_those_of_the_authors_code(golden, instruct, number):
    """One of the two with guidance."""
    out = generate(
        instruct,
        golden["padded_prompt"],
        golden["padded_prompt_mask"].astype(bool),
        sampler=sampler_of(golden, f"padded_generate_{number}"),
    )
    np.testing.assert_array_equal(out.tokens, golden[f"padded_generate_{number}"])


def test_leaving_layers_out_is_a_model_without_them(golden, instruct):
    cfg, params = instruct.config, instruct.params
    kept = jax.tree.map(lambda x: x[np.array([0, 2])], params["layers"])
    shallow = Model(dataclasses.replace(cfg, num_layers=2), {**params, "layers": kept})
    run = {"sampler": Confidence(8, 4, 4, confidence_eos_eot_inf=True), "cache": DualCache()}
    skipped = generate(instruct, golden["prompt"], policy=Static((1, 3)), **run)
    expected = generate(shallow, golden["prompt"], **run)
    np.testing.assert_array_equal(skipped.tokens, expected.tokens)
    assert skipped.nfe == expected.nfe == 4 and skipped.flops.layers_run == 0.5


def test_routed_layers_are_those_of_each_prompt_alone(golden, instruct):
    """In a padded batch with a cache."""
    policy = Routed(random_routers(instruct.config), 0.4)
    run = {"sampler": Confidence(8, 4, 4), "cache": DualCache(), "policy": policy}
    valid = golden["padded_prompt_mask"].astype(bool)
    assert not valid.all()
    together = generate(instruct, golden["padded_prompt"], valid, **run)
    for row, prompt in enumerate(golden["padded_prompt"]):
        alone = generate(instruct, prompt[None, valid[row]], **run)
        np.testing.assert_array_equal(together.tokens[row, -8:], alone.tokens[0, -8:])
        np.testing.assert_array_equal(together.gates[:, :, row], alone.gates[:, :, 0])
    assert 0 < together.gates.mean() < 1
