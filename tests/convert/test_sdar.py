"""An SDAR converts, and gives its authors' logits under the block-causal mask."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from dials_jax.loading import load
from dials_jax.models.model import Model

GOLDEN = Path(__file__).parents[1] / "golden" / "sdar_tiny"


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN / "golden.npz")


@pytest.fixture(scope="module")
def sdar():
    return load(GOLDEN)


@pytest.mark.parametrize("name, length", [("logits", 4), ("logits_other_block", 8)])
def test_logits_are_those_of_the_authors_code_at_any_block_length(golden, sdar, name, length):
    assert sdar.config.block_length == 4
    model = Model(dataclasses.replace(sdar.config, block_length=length), sdar.params)
    logits = model.apply(golden["input_ids"]).logits
    np.testing.assert_allclose(logits, golden[name], rtol=0, atol=2e-4)


def test_a_block_that_is_noisy_sees_the_clean_blocks_before_it(golden, sdar):
    prefix = int(golden["noisy_prefix_length"])
    tokens = np.concatenate([golden["input_ids"][:, :prefix], golden["noisy_block"]], axis=1)
    logits = sdar.apply(tokens).logits[:, prefix:]
    np.testing.assert_allclose(logits, golden["noisy_logits"], rtol=0, atol=2e-4)
