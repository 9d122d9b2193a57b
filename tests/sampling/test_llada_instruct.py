"""LLaDA-Instruct and LLaDA-1.5: the authors' tokens with their flags for the end of text."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from dials_jax.loading import load
from dials_jax.models.model import Model
from dials_jax.sampling.confidence import Confidence
from dials_jax.sampling.generate import generate

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
