"""The likelihood along the order of confidence is that of iLLaDA's authors."""

from pathlib import Path

import numpy as np
import pytest

from dials_jax.errors import InputError
from dials_jax.evaluation.confidence_likelihood import confidence_log_likelihood, confidence_scores
from dials_jax.loading import load

GOLDEN = Path(__file__).parents[1] / "golden" / "illada_tiny"


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN / "golden.npz")


@pytest.fixture(scope="module")
def illada():
    return load(GOLDEN)


@pytest.mark.parametrize("name, append_eos", [("", False), ("_padd_eos", True)])
def test_the_authors_values_and_order_also_beside_a_longer_pair(golden, illada, name, append_eos):
    prompt, answer = golden["ll_prompt"].tolist(), golden["ll_answer"].tolist()
    other = (prompt + prompt, answer + answer[:3])
    scores = confidence_scores(illada, [(prompt, answer), other], append_eos=append_eos)
    np.testing.assert_allclose(
        scores.log_likelihood[0], golden[f"ll_confidence{name}"], rtol=0, atol=1e-3
    )
    order = golden[f"ll_confidence{name}_order"]
    np.testing.assert_array_equal(scores.order[:, 0], [*order, -1, -1, -1])
    assert sorted(scores.order[:, 1]) == list(range(12)), "each token is revealed once"


def test_one_token_more_than_positions_is_refused(illada):
    prompt = [7] * (illada.config.max_length - 1)
    with pytest.raises(InputError, match="513 tokens, the end of text counted, for 512"):
        confidence_log_likelihood(illada, prompt, [8], append_eos=True)
