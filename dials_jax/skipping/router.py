"""DIALS routers: a small network before every layer, whose masked tokens vote on skipping it.

Source: DIALS, section 3.2. Vote 0 is to skip, vote 1 to execute.
"""

from __future__ import annotations

from functools import lru_cache

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from dials_jax import trees
from dials_jax.config import RouterConfig, require
from dials_jax.keys import threefry_key
from dials_jax.nn.initializers import normal
from dials_jax.nn.norm import RMSNorm
from dials_jax.nn.pure import Pure

SKIP = 0


class Router(nnx.Module):
    """RMSNorm, linear, SiLU, linear to two logits.

    The last layer starts at zero with biases (0, execute_bias): at first every token votes the
    same, about 5 % of them to skip under Gumbel noise, so that most layers run.
    """

    def __init__(self, d_model: int, cfg: RouterConfig, rngs: nnx.Rngs):
        self.norm = RMSNorm(d_model, 1e-5, rngs)
        self.down = nnx.Param(normal(rngs, (d_model, cfg.d_hidden)))
        self.down_bias = nnx.Param(jnp.zeros(cfg.d_hidden))
        self.vote = nnx.Param(jnp.zeros((cfg.d_hidden, 2)))
        self.vote_bias = nnx.Param(jnp.array([0.0, cfg.execute_bias]))

    def hidden(self, h: Float[Array, "B T D"]) -> Float[Array, "B T R"]:
        """Only this wide product runs in the stream's dtype."""
        x = jnp.einsum(
            "BTD,DR->BTR",
            self.norm(h),
            self.down[...].astype(h.dtype),
            preferred_element_type=jnp.float32,
        )
        return jax.nn.silu(x + self.down_bias[...])

    @jax.named_scope("router")
    def __call__(self, h: Float[Array, "B T D"]) -> Float[Array, "B T 2"]:
        """Float32 logits."""
        return jnp.einsum("BTR,RK->BTK", self.hidden(h), self.vote[...]) + self.vote_bias[...]

    @jax.named_scope("router")
    def margin(self, h: Float[Array, "B T D"]) -> Float[Array, "B T"]:
        """By how much skipping is ahead. As a sum, not a thin product, it fuses with the rest."""
        vote, bias = (
            x[..., SKIP] - x[..., 1 - SKIP] for x in (self.vote[...], self.vote_bias[...])
        )
        return jnp.sum(self.hidden(h) * vote, axis=-1) + bias


@lru_cache
def router_module(d_model: int, cfg: RouterConfig) -> Pure:
    return Pure(lambda rngs: Router(d_model, cfg, rngs))


def init_routers(d_model: int, num_layers: int, cfg: RouterConfig, key: jax.Array) -> trees.Params:
    """Routers of all layers, stacked, in float32."""
    return router_module(d_model, cfg).init_stack(threefry_key(key), num_layers)


def rounded(routers: trees.Params, dtype: str) -> trees.Params:
    """For inference in `dtype`: the kernel of the one product that runs in it.

    Every call would round it again; the votes are the same.
    """
    return {**routers, "down": routers["down"].astype(dtype)}


def apply_router(router: trees.Params, h: Float[Array, "B T D"]) -> Float[Array, "B T 2"]:
    """Vote logits of one layer's router."""
    return _module_of(router, h)(router, h)


def votes_to_skip(router: trees.Params, h: Float[Array, "B T D"]) -> Float[Array, "B T"]:
    """1 where one layer's router votes to skip, without noise; a draw is one."""
    return (_module_of(router, h)(router, h, method="margin") >= 0).astype(jnp.float32)


def _module_of(router: trees.Params, h: Float[Array, "B T D"]) -> Pure:
    """Raises: InputError for a router of models of another width."""
    d_model, d_hidden = router["down"].shape
    require(
        d_model == h.shape[-1],
        f"the router is of width {d_model} and the model of {h.shape[-1]}; train one for this "
        "model",
    )
    return router_module(d_model, RouterConfig(d_hidden=d_hidden))


def skip_share(votes: Float[Array, "B T"], masked: Bool[Array, "B T"]) -> Float[Array, "B"]:
    """Mean vote to skip over a row's masked tokens (DIALS, equation 5); 0 without any."""
    count = jnp.sum(masked, axis=-1)
    return jnp.sum(votes * masked, axis=-1) / jnp.maximum(count, 1)
