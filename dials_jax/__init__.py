"""Masked diffusion language models that leave work out, and what it costs.

import dials_jax as dj

model = dj.load("path/to/model")
router = dj.load_router("runs/router", model)
sampler = dj.Confidence(gen_length=256, block_length=32)
out = dj.generate(model, prompts, sampler=sampler, policy=router)
out.tokens, out.gates, out.flops
"""

from dials_jax.caching.early_skip.settings import EarlySkip
from dials_jax.caching.plain import DualCache, PrefixCache
from dials_jax.config import ModelConfig, RouterConfig
from dials_jax.data.tokenizer import load_tokenizer
from dials_jax.errors import InputError
from dials_jax.evaluation.likelihood import estimate_log_likelihood, log_likelihood
from dials_jax.loading import load
from dials_jax.models.model import Model
from dials_jax.sampling.ancestral import Ancestral
from dials_jax.sampling.autoregressive import Autoregressive
from dials_jax.sampling.confidence import Confidence
from dials_jax.sampling.dream import Dream
from dials_jax.sampling.generate import generate
from dials_jax.sampling.model_schedule import Schedule
from dials_jax.skipping.policies import Random, Static
from dials_jax.skipping.routed import Routed
from dials_jax.skipping.storage import load_router

__all__ = [
    "Ancestral",
    "Autoregressive",
    "Confidence",
    "Dream",
    "DualCache",
    "EarlySkip",
    "InputError",
    "Model",
    "ModelConfig",
    "PrefixCache",
    "Random",
    "Routed",
    "RouterConfig",
    "Schedule",
    "Static",
    "estimate_log_likelihood",
    "generate",
    "load",
    "load_router",
    "load_tokenizer",
    "log_likelihood",
]
