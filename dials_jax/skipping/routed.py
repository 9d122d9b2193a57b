"""DIALS: routers, a small network before every layer whose masked tokens vote on skipping it.

Vote 0 is to skip, vote 1 to execute. In training votes are drawn with Gumbel noise, votes and gates
are hard, and gradients pass through them straight. At inference there is no noise.

Source: DIALS, section 3.2 and DIALS, Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Number
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from dials_jax import trees
from dials_jax.config import ModelConfig, RouterConfig, Typed, Votes, as_type, shown
from dials_jax.errors import require
from dials_jax.keys import threefry_key
from dials_jax.nn.kernels.row_sums import row_sum
from dials_jax.nn.linear import linear
from dials_jax.nn.modules import bind, init_stacked, normal
from dials_jax.nn.norm import RMSNorm
from dials_jax.nn.policy import Denoising
from dials_jax.skipping.flops import router_flops
from dials_jax.skipping.policies import static_field


class RoutedLayer(NamedTuple):
    router: trees.Params
    threshold: Float[Array, "..."]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class Routed(Typed):
    """Skips a layer for a sequence when more than `threshold` of its masked tokens vote so.

    A sequence without masked tokens executes everything. Padding never votes.
    Source: DIALS, Algorithm 1. `router` has the parameters of all layers, stacked or unrolled.

    Attributes:
      threshold: tau, one number or one per layer. It is an argument of compiled programs: one
        program serves all.
      votes: "hard": a token's vote is its larger logit, as in the paper. "soft": it is the
        probability of that vote under the noise of training, so that the threshold meets the
        expected share of training.
    """

    name = "routed"
    uses_keys = False

    router: PyTree
    threshold: Any = 0.1  # JAX also builds the class around tracers and shapes
    votes: Votes = static_field(default="hard")

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.threshold, Number | str | bytes | Sequence | dict | np.ndarray):
            object.__setattr__(self, "threshold", as_threshold(self.threshold))
        require(
            not isinstance(self.router, str | Path),
            f"router={str(self.router)!r} is a path; give what load_router(path, model) returns",
        )

    def __repr__(self) -> str:
        """Never prints the arrays, which may lie on a device, or be traced."""
        leaves = jax.tree.leaves(self.router)
        router = f"{trees.count_parameters(self.router):,} parameters" if leaves else "no router"
        is_number = isinstance(self.threshold, float)
        threshold = self.threshold if is_number else f"of shape {np.shape(self.threshold)}"
        return f"Routed({router}, threshold {threshold}, {self.votes} votes)"

    def prepare(self, num_layers: int, denoising: Denoising) -> PyTree:
        check_router(self.router, num_layers)
        self.check_threshold(num_layers)
        thresholds = jnp.broadcast_to(jnp.asarray(self.threshold, jnp.float32), num_layers)
        if trees.is_unrolled(self.router):
            return tuple(map(RoutedLayer, self.router, thresholds))
        return RoutedLayer(self.router, thresholds)

    def check_threshold(self, num_layers: int) -> None:
        """Raises: InputError unless there is one threshold, or one for each of these layers."""
        given = getattr(self.threshold, "shape", None)
        require(
            isinstance(self.threshold, float) or given is not None,
            f"threshold={shown(self.threshold)} must be a number, or one per layer",
        )
        given = given or ()
        require(
            given in ((), (num_layers,)),
            f"threshold has shape {given} and the model {num_layers} layers; give one number, or "
            "one per layer",
        )

    def gate(
        self, prepared: RoutedLayer, h: Float[Array, "B T D"], denoising: Denoising
    ) -> Bool[Array, "B"]:
        start = denoising.prompt_length
        votes = votes_to_skip(prepared.router, h[:, start:], self.votes)
        share = skip_share(votes, denoising.masked[:, start:])
        return share <= prepared.threshold  # DIALS (6)

    def flops(self, cfg: ModelConfig, num_tokens: Any) -> Any:
        """One layer's router on one sequence of `num_tokens` tokens that it looks at."""
        shape = router_shape(trees.layer_slice(self.router, 0))
        return router_flops(cfg, num_tokens, shape.d_hidden, shape.depth)


def as_threshold(value: Any) -> float | Float[np.ndarray, "L"]:
    """A threshold that a user gave: a number, or one per layer.

    Raises: InputError for anything but numbers in [0, 1].
    """
    whole = isinstance(value, Number | str | bytes | dict) or np.ndim(value) == 0
    found = as_type(float if whole else tuple[float, ...], value, "threshold")
    for one in (found,) if whole else found:
        require(0 <= one <= 1, f"threshold={one} must lie in [0, 1]")
    return found if whole else np.asarray(found, np.float32)


class LayerRouter(NamedTuple):
    router: trees.Params
    layer: Int[Array, "..."]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StochasticRouted:
    """`Routed` for training: Gumbel votes, and float gates with straight-through gradients.

    Attributes:
      noise_scale: what the noise is multiplied with; 0 gives the votes of inference, None is 1.
    """

    router: PyTree
    threshold: float = static_field()
    temperature: float = static_field()
    noise_scale: Any = None

    def prepare(self, num_layers: int, denoising: Denoising) -> LayerRouter:
        check_router(self.router, num_layers)
        return LayerRouter(self.router, np.arange(num_layers))

    def gate(
        self, prepared: LayerRouter, h: Float[Array, "B T D"], denoising: Denoising
    ) -> Float[Array, "B"]:
        def noise(key):
            return jax.random.gumbel(jax.random.fold_in(key, prepared.layer), (h.shape[1], 2))

        gumbel = jax.vmap(noise)(denoising.sequence_keys)
        gumbel = gumbel if self.noise_scale is None else self.noise_scale * gumbel
        votes = gumbel_votes(gumbel, apply_router(prepared.router, h), self.temperature)
        share = skip_share(votes[..., SKIP], denoising.masked)
        return 1.0 - straight_through_threshold(share, self.threshold)


def check_router(router: PyTree, num_layers: int) -> None:
    leaves = jax.tree.leaves(router)
    arrays = bool(leaves) and all(np.ndim(leaf) > 0 and hasattr(leaf, "dtype") for leaf in leaves)
    require(arrays, "the router holds no arrays of parameters; give what load_router returns")
    layers = trees.num_layers(router)
    require(
        layers == num_layers,
        f"the router has {layers} layers and the model {num_layers}; train one for this model",
    )


def gumbel_noise_scale(cfg: RouterConfig, step: Int[Array, ""] | int) -> Float[Array, ""] | None:
    """The scale of the noise at a training step; None where it stays 1."""
    if cfg.anneal_steps is None:
        return None
    return jnp.maximum(1 - step / cfg.anneal_steps, 0.0)


def gumbel_votes(
    gumbel: Float[Array, "*B 2"], logits: Float[Array, "*B 2"], temperature: float
) -> Float[Array, "*B 2"]:
    """One-hot votes with the gradient of the Gumbel-softmax (Jang et al. 2016).

    Args:
      gumbel: standard Gumbel noise.
      temperature: of the relaxation; it does not change the votes, only their gradient.
    """
    soft = jax.nn.softmax((logits + gumbel) / temperature, axis=-1)
    hard = jax.nn.one_hot(jnp.argmax(soft, axis=-1), 2, dtype=soft.dtype)
    return soft + lax.stop_gradient(hard - soft)


def straight_through_threshold(share: Float[Array, "*B"], tau: float) -> Float[Array, "*B"]:
    """1[share > tau] with the gradient of `share` (Bengio et al. 2013); DIALS (6) in training."""
    hard = (share > tau).astype(share.dtype)
    return share + lax.stop_gradient(hard - share)


def advice_if_idle(layers_run: float) -> str:
    """What to do about a router that skips hardly anything at inference; else an empty text."""
    if layers_run < 1.0 - IDLE:
        return ""
    skipped = f"skips {1.0 - layers_run:.1%} of the layers" if layers_run < 1.0 else "never skips"
    return (
        f"the router {skipped}: train with a larger lambda (--objective.skip-weight) or for more "
        "steps, or evaluate with a smaller tau (--skip-threshold) or soft votes (--votes soft)"
    )


SKIP = 0
IDLE = 0.01  # a router that skips no more than this share of the layers is of no use


class Router(nnx.Module):
    """RMSNorm, linear, SiLU, linear to two logits; with a larger `depth`, more linears and SiLUs.

    The last layer starts at zero with biases (0, execute_bias): at first every token votes the
    same, about 5 % of them to skip under Gumbel noise, so that most layers run.
    """

    def __init__(self, d_model: int, cfg: RouterConfig, rngs: nnx.Rngs):
        self.norm = RMSNorm(d_model, 1e-5, rngs)
        self.down = nnx.Param(normal(rngs, (d_model, cfg.d_hidden)))
        self.down_bias = nnx.Param(jnp.zeros(cfg.d_hidden))
        if cfg.depth > 2:
            inner = cfg.depth - 2, cfg.d_hidden, cfg.d_hidden
            self.inner = nnx.Param(normal(rngs, inner, cfg.d_hidden**-0.5))
            self.inner_bias = nnx.Param(jnp.zeros(inner[:2]))
        self.vote = nnx.Param(jnp.zeros((cfg.d_hidden, 2)))
        self.vote_bias = nnx.Param(jnp.array([0.0, cfg.execute_bias]))

    def hidden(self, h: Float[Array, "B T D"]) -> Float[Array, "B T R"]:
        """Only the first, wide matmul runs in the dtype of `h`."""
        x = jax.nn.silu(
            linear(self.norm(h), self.down, self.down_bias, axes="BTD,DR->BTR", dtype=jnp.float32)
        )
        if hasattr(self, "inner"):
            for kernel, bias in zip(self.inner[...], self.inner_bias[...], strict=True):
                x = jax.nn.silu(linear(x, kernel, bias, axes="BTR,RS->BTS"))
        return x

    @jax.named_scope("router")
    def __call__(self, h: Float[Array, "B T D"]) -> Float[Array, "B T 2"]:
        """Float32 logits."""
        return linear(self.hidden(h), self.vote, self.vote_bias, axes="BTR,RK->BTK")

    @jax.named_scope("router")
    def margin(self, h: Float[Array, "B T D"]) -> Float[Array, "B T"]:
        """By how much skipping leads. As a sum, unlike a thin matmul, it fuses with the rest."""
        vote, bias = (
            x[..., SKIP] - x[..., 1 - SKIP] for x in (self.vote[...], self.vote_bias[...])
        )
        return row_sum(self.hidden(h) * vote) + bias


def init_routers(d_model: int, num_layers: int, cfg: RouterConfig, key: jax.Array) -> trees.Params:
    """Routers of all layers, stacked, in float32."""
    return init_stacked(Router, threefry_key(key), num_layers, d_model, cfg)


def rounded(routers: trees.Params, dtype: str) -> trees.Params:
    """For inference in `dtype`: rounds the kernel of the one matmul that runs in it.

    Every call would round it again; the votes are the same.
    """
    return {**routers, "down": routers["down"].astype(dtype)}


def apply_router(router: trees.Params, h: Float[Array, "B T D"]) -> Float[Array, "B T 2"]:
    """Vote logits of one layer's router."""
    return _bound(router, h)(h)


def votes_to_skip(
    router: trees.Params, h: Float[Array, "B T D"], votes: Votes = "hard"
) -> Float[Array, "B T"]:
    """What the tokens vote at one layer, without noise.

    Hard: 1 is to skip, and so is a tie. Soft: the probability that a vote under the noise of
    training is to skip.
    """
    margin = _bound(router, h).margin(h)
    return jax.nn.sigmoid(margin) if votes == "soft" else (margin >= 0).astype(jnp.float32)


def _bound(router: trees.Params, h: Float[Array, "B T D"]) -> Router:
    """Raises: InputError for a router of models of another width."""
    d_model, _ = router["down"].shape
    require(
        d_model == h.shape[-1],
        f"the router is of width {d_model} and the model of {h.shape[-1]}; train one for this "
        "model",
    )
    return bind(Router, router, d_model, router_shape(router))


def router_shape(router: trees.Params) -> RouterConfig:
    """Width and depth of one layer's router, from its arrays."""
    inner = router["inner"].shape[0] if "inner" in router else 0
    return RouterConfig(d_hidden=router["down"].shape[1], depth=2 + inner)


def skip_share(votes: Float[Array, "B T"], masked: Bool[Array, "B T"]) -> Float[Array, "B"]:
    """DIALS (5): the mean vote to skip over a sequence's masked tokens; 0 without any."""
    count = jnp.sum(masked, axis=-1)
    return row_sum(votes * masked) / jnp.maximum(count, 1)
