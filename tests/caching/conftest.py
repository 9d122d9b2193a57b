import jax
import numpy as np
import pytest

from dials_jax import trees
from dials_jax.models.model import Model
from tests.caching.cases import P, make_lively, policies_of
from tests.conftest import small_config


@pytest.fixture(scope="session")
def models():
    """In a Dream token i is predicted at position i - 1; here two heads share keys, too."""
    dream = make_lively(small_config(num_layers=3, right_shift=True, num_kv_heads=2), 4)
    layers = trees.unstack(jax.device_get(dream.params["layers"]))
    return {
        "llada": make_lively(small_config(), 0),
        "dream": dream,
        "unrolled": Model(dream.config, {**dream.params, "layers": layers}),
    }


@pytest.fixture(scope="session")
def prompts():
    """Three sequences, padded on the left by 0, 1 and 3."""
    tokens = np.random.default_rng(0).integers(2, 60, (3, P))
    return tokens, np.arange(P) >= np.array([0, 1, 3])[:, None]


@pytest.fixture(scope="session")
def policies(cfg):
    return policies_of(cfg)
