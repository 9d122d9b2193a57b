"""A toy block in which tokens of a row mix, for the executors."""

from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dials_jax import trees
from dials_jax.nn.kv import gather
from dials_jax.nn.policy import Denoising
from dials_jax.nn.stack import Layer, run_stack

T, D, L = 5, 32, 4  # D and L are those of the routers fixture


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Given:
    """Gates that a test states: [L, B], or [L] for all rows together."""

    gates: Any

    def prepare(self, num_layers, denoising):
        return self.gates

    def gate(self, plan, h, denoising):
        return plan


class Context(NamedTuple):
    valid: jax.Array
    output_positions: jax.Array | None = None


def project(params, h, context):
    """The mean of a row's valid tokens: once to mix in, and once to remember."""
    valid = context.valid[..., None]
    mean = jnp.sum(h * valid, axis=1) / jnp.sum(valid, axis=1)
    return mean, {"mean": mean}


def mix(params, h, mean, memory, context):
    """A residual block that mixes the tokens of a row with what it remembers of the row."""
    return h + jnp.tanh((h + (mean + memory["mean"])[:, None]) @ params["w"])


def block(params, h, context):
    mean, update = project(params, h, context)
    near = h if context.output_positions is None else gather(h, context.output_positions)
    return mix(params, near, mean, update, context)


def remember(memory, update, context, keep):
    """Adds to half of what was remembered, in the rows to keep."""

    def put(old, new):
        new = old / 2 + new
        return new if keep is None else jnp.where(keep[:, None], new, old)

    return jax.tree.map(put, memory, update)


LAYER = Layer(block, project, remember, mix)

LAYERS = {"w": 0.3 * jax.random.normal(jax.random.key(0), (L, D, D))}


@cache
def make_rows(num_rows, seed=1):
    """Hidden states, left padding of 0, 1 or 2 tokens, and what a policy may know."""
    h, valid, masked, keys = _draw_rows(num_rows, seed)
    return h, Context(valid), Denoising(masked, jnp.asarray(3), keys)


@partial(jax.jit, static_argnums=0)
def _draw_rows(num_rows, seed):
    h = jax.random.normal(jax.random.key(seed), (num_rows, T, D))
    valid = jnp.arange(T) >= (jnp.arange(num_rows) % 3)[:, None]
    masked = valid & (jax.random.uniform(jax.random.key(seed + 1), (num_rows, T)) < 0.6)
    return h, valid, masked, jax.random.split(jax.random.key(seed + 2), num_rows)


@partial(jax.jit, static_argnames=("span", "executor"))
def jitted(layers, h, context, policy, denoising, memory=None, *, executor, span=None):
    denoising = denoising._replace(prompt_length=0)  # an argument would be traced
    return run_stack(
        LAYER,
        layers,
        h,
        context,
        policy,
        denoising,
        span=span,
        cache_state=memory,
        executor=executor,
    )


def run(policy, rows, executor="auto", unrolled=False):
    layers = trees.unstack(LAYERS) if unrolled else LAYERS
    out = jitted(layers, rows[0], rows[1], policy, rows[2], executor=executor)
    return np.asarray(out.h), np.asarray(out.gates)
