"""Caches, samplers and policies that are tested together.

A shifted model, prompts of different lengths, and caches small enough for three or four layers.
Compiling takes nearly all of the time: a program has each forward variant, and each variant its
ranges of layers. So there are two blocks, and several layers that skip tokens only once.
"""

import jax
import numpy as np

from dials_jax.caching.early_skip.settings import EarlySkip
from dials_jax.caching.plain import DualCache, NoCache, PrefixCache
from dials_jax.models.model import Model
from dials_jax.sampling.confidence import Confidence
from dials_jax.skipping.policies import Random, Static
from dials_jax.skipping.routed import Routed
from tests.conftest import MASK, amplify, init_params, random_routers, silence

P = 5
PLACES = {"proportions": (1.0, 0.5, 0.25), "depths": (0.0, 0.25, 0.5)}  # behind layers 1 and 2
CACHES = {
    "none": NoCache(),
    "prefix": PrefixCache(),
    "dual": DualCache(),
    # Of 2 blocks of 8: the canvas, skips, the block, 2 blocks, and a refresh within the second.
    "skip": EarlySkip(**PLACES, prompt_every=12, block_every=4),
    # Of 8 tokens 4 go on: the leftmost masked one, that revealed last and the two most confident,
    # as long as a step reveals one. Of 6 the others' scores choose two.
    "hidden": EarlySkip((1.0, 0.5), (0.0, 0.3), prompt_every=12, block_every=4),
    "query": EarlySkip((1.0, 0.75), (0.0, 0.3), 0.9, 12, 4, "query"),
    "key": EarlySkip((1.0, 0.5), (0.0, 0.3), 0.1, 12, 4, "key"),
    "value": EarlySkip((1.0, 0.75), (0.0, 0.3), 0.3, 12, 4, "value"),
    # Between the two layers that skip tokens there is none.
    "neighbours": EarlySkip(**PLACES, prompt_every=12, block_every=4, indicator="key"),
}
G = 16
QUOTA = Confidence(gen_length=G, block_length=8, steps=G)
QUOTA_4 = Confidence(gen_length=G, block_length=8, steps=4)
THRESHOLD = Confidence(gen_length=G, block_length=8, steps=G, threshold=0.5)


def make_lively(cfg, seed):
    """A model that never says [MASK], whose sequences, tokens, layers and confidences differ."""
    params = silence(amplify(init_params(cfg, seed), 8), MASK)
    return Model(cfg, {**params, "head": {"kernel": 3 * params["head"]["kernel"]}})


def policies_of(cfg):
    return {
        "full": None,
        "static": Static((1,)),
        "random": Random(1),
        "routed": Routed(random_routers(cfg, seed=4), 0.3),
        "soft": Routed(
            random_routers(cfg, seed=4), np.linspace(0.2, 0.5, cfg.num_layers), votes="soft"
        ),
    }


def keys_of(num_sequences):
    return jax.random.split(jax.random.key(7), num_sequences)
