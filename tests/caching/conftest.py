"""A shifted model, prompts of different lengths, and caches small enough for three or four layers.

Compiling takes nearly all of the time: a program has each kind of model call, and each kind its
ranges of layers. So there are two blocks, and more than one place to leave only once.
"""

import jax
import numpy as np
import pytest

from dials_jax import trees
from dials_jax.caching.early_skip.settings import EarlySkip
from dials_jax.caching.plain import DualCache, NoCache, PrefixCache
from dials_jax.models import transformer
from dials_jax.models.model import Model
from dials_jax.sampling.confidence import Confidence
from dials_jax.skipping.policies import Random, Static
from dials_jax.skipping.routed import Routed
from tests.conftest import MASK, random_routers, small_config

P = 5
PLACES = {"proportions": (1.0, 0.5, 0.25), "depths": (0.0, 0.25, 0.5)}  # leave after layers 1, 2
CACHES = {
    "none": NoCache(),
    "prefix": PrefixCache(),
    "dual": DualCache(),
    # Of 2 blocks of 8: the canvas, skips, the block, 2 blocks, and a refresh within the second.
    "skip": EarlySkip(**PLACES, prompt_every=12, block_every=4),
} | {
    name: EarlySkip((1.0, 0.5), (0.0, 0.3), prompt_every=12, block_every=4, indicator=name)
    for name in ("hidden", "query", "key")
}
G = 16
QUOTA = Confidence(gen_length=G, block_length=8, steps=G)
QUOTA_4 = Confidence(gen_length=G, block_length=8, steps=4)
THRESHOLD = Confidence(gen_length=G, block_length=8, steps=G, threshold=0.5)


def make_lively(cfg, seed):
    """A model whose rows, tokens, layers and confidences differ, and which never says [MASK]."""
    params = transformer.init(cfg, jax.random.key(seed))
    params = trees.map_named(lambda name, x: x if "norm" in name else 8 * x, params)
    kernel = 3 * params["head"]["kernel"].at[:, MASK].set(0.0)
    return Model(cfg, {**params, "head": {"kernel": kernel}})


@pytest.fixture(scope="session")
def models():
    """In a Dream token i is predicted by row i - 1; here two heads share keys and values, too."""
    dream = make_lively(small_config(num_layers=3, shift=True, num_kv_heads=2), 4)
    layers = trees.unstack(dream.params["layers"])
    return {
        "llada": make_lively(small_config(), 0),
        "dream": dream,
        "unrolled": Model(dream.config, {**dream.params, "layers": layers}),
    }


@pytest.fixture(scope="session")
def prompts():
    """Three rows, padded on the left by 0, 1 and 3."""
    tokens = np.random.default_rng(0).integers(2, 60, (3, P))
    return tokens, np.arange(P) >= np.array([0, 1, 3])[:, None]


@pytest.fixture(scope="session")
def policies(cfg):
    return policies_of(cfg)


def policies_of(cfg):
    return {
        "full": None,
        "static": Static((1,)),
        "random": Random(1),
        "routed": Routed(random_routers(cfg, seed=4), 0.3),
    }


def keys_of(num_sequences):
    return jax.random.split(jax.random.key(7), num_sequences)
