"""Masked diffusion language models that leave work out, and what it costs.

import dials_jax as dj

model = dj.load("path/to/model")
router = dj.load_router("runs/router", model)
for answer in dj.generate_text(model, ["1 + 1 ="], policy=router):
    answer.text, answer.passes, answer.layers_run

sampler = dj.Confidence(gen_length=256, block_length=32)
out = dj.generate(model, prompts, sampler=sampler, policy=router)  # prompts: token ids
out.tokens, out.gates, out.flops
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dials_jax.caching.early_skip.settings import EarlySkip
    from dials_jax.caching.plain import DualCache, PrefixCache
    from dials_jax.config import MeshConfig, ModelConfig, RouterConfig
    from dials_jax.data.tokenizer import load_tokenizer
    from dials_jax.errors import InputError
    from dials_jax.evaluation.confidence_likelihood import confidence_log_likelihood
    from dials_jax.evaluation.likelihood import estimate_log_likelihood, log_likelihood
    from dials_jax.evaluation.sweep import sweep
    from dials_jax.export import export_model
    from dials_jax.loading import load
    from dials_jax.models.model import Model
    from dials_jax.reporting.results import load_results
    from dials_jax.sampling.ancestral import Ancestral
    from dials_jax.sampling.autoregressive import Autoregressive
    from dials_jax.sampling.block_diffusion import BlockDiffusion
    from dials_jax.sampling.confidence import Confidence
    from dials_jax.sampling.dream import Dream
    from dials_jax.sampling.generate import generate
    from dials_jax.sampling.infill import infill
    from dials_jax.sampling.model_schedule import Schedule
    from dials_jax.skipping.policies import Random, Static
    from dials_jax.skipping.routed import Routed
    from dials_jax.skipping.storage import load_router
    from dials_jax.studies.study import study
    from dials_jax.text import GeneratedText, generate_text
    from dials_jax.training.loop import train
    from dials_jax.watching import replay

__version__ = "0.2.0"

# Where each public name stands. It is imported when it is first used, so that `dials --help` and
# `dj.__version__` need not wait for JAX. Type checkers read the imports above.
_HOMES = {
    "Ancestral": "sampling.ancestral",
    "Autoregressive": "sampling.autoregressive",
    "BlockDiffusion": "sampling.block_diffusion",
    "Confidence": "sampling.confidence",
    "Dream": "sampling.dream",
    "DualCache": "caching.plain",
    "EarlySkip": "caching.early_skip.settings",
    "GeneratedText": "text",
    "InputError": "errors",
    "MeshConfig": "config",
    "Model": "models.model",
    "ModelConfig": "config",
    "PrefixCache": "caching.plain",
    "Random": "skipping.policies",
    "Routed": "skipping.routed",
    "RouterConfig": "config",
    "Schedule": "sampling.model_schedule",
    "Static": "skipping.policies",
    "confidence_log_likelihood": "evaluation.confidence_likelihood",
    "estimate_log_likelihood": "evaluation.likelihood",
    "export_model": "export",
    "generate": "sampling.generate",
    "generate_text": "text",
    "infill": "sampling.infill",
    "load": "loading",
    "load_results": "reporting.results",
    "load_router": "skipping.storage",
    "load_tokenizer": "data.tokenizer",
    "log_likelihood": "evaluation.likelihood",
    "replay": "watching",
    "study": "studies.study",
    "sweep": "evaluation.sweep",
    "train": "training.loop",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
