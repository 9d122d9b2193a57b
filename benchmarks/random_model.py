"""Models of published shapes with random weights, made on the device: no checkpoint, no network."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dials_jax import sharding, trees
from dials_jax.config import EightBits, ModelConfig, RouterConfig
from dials_jax.errors import nearest, require
from dials_jax.keys import seed_key
from dials_jax.models import families, transformer
from dials_jax.models.folders import build_model
from dials_jax.models.groups import Layout
from dials_jax.models.model import Model
from dials_jax.skipping.routed import Routed, init_routers, rounded

MODELS = {
    "llada_8b": families.llada_8b,
    "dream_7b": families.dream_7b,
    "qwen2_5_7b": families.qwen2_5_7b,
    "mdlm": families.mdlm,
    # Tiny models of the same families, to try a benchmark on a laptop.
    "tiny": partial(families.llada_small, 8, 64, 512, mask_id=511, eos_id=1, pad_id=0),
    "tiny_mdlm": partial(families.mdlm_small, 4, 64, 512, mask_id=511, eos_id=1, pad_id=0),
}


def make_config(name: str, num_layers: int | None = None) -> ModelConfig:
    """The configuration of a model by name, with fewer layers if `num_layers` is given."""
    require(name in MODELS, f"model {name!r} is not known{nearest(name, MODELS)}")
    cfg = MODELS[name]()
    return cfg if num_layers is None else dataclasses.replace(cfg, num_layers=num_layers)


def make_model(
    cfg: ModelConfig,
    layout: Layout = "auto",
    seed: int = 0,
    mesh: Mesh | None = None,
    weights: EightBits | None = None,
    batch_invariant: bool = False,
) -> Model:
    """Makes a model with random weights in the configuration's dtype, group by group.

    Args:
      mesh: None: one over all devices. The weights do not depend on it.
      weights: in 8 bits, as `load` quantises them.
      batch_invariant: as `load` takes it.
    """
    mesh, key, made = mesh or sharding.make_mesh(), seed_key(seed), {}

    def read(name, shardings):
        kind, _, number = name.partition("/")
        if kind not in made:
            made[kind] = jax.jit(
                lambda key: trees.cast(transformer.init_group(cfg, kind, key), cfg.dtype),
                out_shardings=shardings,
            )
        group = made[kind](jax.random.fold_in(key, int(number or 0)))
        if kind == "head" and cfg.mask_id is not None:  # a trained model never predicts [MASK]
            return group | {"kernel": group["kernel"].at[:, cfg.mask_id].set(0)}
        return group

    return build_model(cfg, read, mesh, layout, "", weights, batch_invariant)


def make_routers(model: Model, num_skipped: int = 0, d_hidden: int = 512, seed: int = 1) -> Routed:
    """Makes routers of DIALS' size that skip the last `num_skipped` layers for every sequence."""
    cfg = model.config
    routers = init_routers(
        cfg.d_model, cfg.num_layers, RouterConfig(d_hidden=d_hidden), seed_key(seed)
    )
    skip = jnp.arange(cfg.num_layers) >= cfg.num_layers - num_skipped
    routers["vote_bias"] = jnp.where(skip[:, None], jnp.array([9.0, 0.0]), jnp.array([0.0, 9.0]))
    routers = rounded(routers, cfg.dtype)
    if trees.is_unrolled(model.params["layers"]):
        routers = trees.unstack(routers)
    return Routed(jax.device_put(routers, sharding.replicated(model.mesh)), 0.1)
