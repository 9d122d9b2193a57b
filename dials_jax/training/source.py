"""Training that starts from another model's weights, for example a causal model's (as Dream)."""

from __future__ import annotations

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from dials_jax import trees
from dials_jax.config import ModelConfig
from dials_jax.errors import require
from dials_jax.loading import load
from dials_jax.models import groups
from dials_jax.models.model import Model

VOCABULARY_AXIS = {"embed/table": 0, "head/kernel": 1, "head/bias": 0}
SAME_SETTINGS = ("rope_theta", "norm", "norm_eps")  # of computations with weights of equal shapes


def load_source(path: str, cfg: ModelConfig, mesh: Mesh) -> Model:
    """Loads the model that training starts from, in float32.

    Shapes, rotary angles and norms have to agree. Attention may become bidirectional, predictions
    may be shifted, and the vocabulary may gain tokens such as [MASK].

    Raises: InputError naming the first setting or array that does not fit.
    """
    source = load(path, dtype="float32", mesh=mesh, layout="stacked")
    require_trainable(source, "init_from", path)
    new_size, old_size = cfg.vocab_size, source.config.vocab_size
    require(
        old_size <= new_size,
        f"init_from={path} has {old_size} tokens and this model {new_size}; "
        "a vocabulary may grow, not shrink",
    )
    for name in SAME_SETTINGS:
        there, here = getattr(source.config, name), getattr(cfg, name)
        require(
            there == here,
            f"init_from={path}: its weights were trained with {name}={there!r}, not {here!r}; "
            "take the source's value",
        )
    have = {name: x.shape for name, x in trees.named_leaves(source.params)}
    for name, x in trees.named_leaves(groups.abstract_params(cfg)):
        shape, axis = list(x.shape), VOCABULARY_AXIS.get(name)
        if axis is not None:
            shape[axis] = old_size
        found = have.pop(name, None)
        require(
            found == tuple(shape),
            f"init_from={path}: {name} is {found or 'missing'} there and must be {tuple(shape)} "
            "for this model; take the source's sizes",
        )
    require(not have, f"init_from={path}: this model has no {', '.join(have)}; take one that has")
    return source


def require_trainable(model: Model, field: str, path: str) -> None:
    """Raises: InputError for weights in 8 bits, through which no gradient is computed."""
    require(
        model.weights is None,
        f"{field}={path} has weights in {model.weights}, which have no gradients, neither for "
        "models nor for routers; give the model that it was converted from",
    )


def grow_vocabulary(params: trees.Params, vocab_size: int) -> trees.Params:
    """Adds tokens up to `vocab_size`; each starts as the mean of the old ones."""

    def grow(name: str, x: Array) -> Array:
        axis = VOCABULARY_AXIS.get(name)
        if axis is None or x.shape[axis] == vocab_size:
            return x
        mean = jnp.mean(x, axis=axis, keepdims=True)
        new = jnp.repeat(mean, vocab_size - x.shape[axis], axis=axis)
        return jnp.concatenate([x, new], axis=axis)

    return trees.map_named(grow, params)
