"""Feed-forward layers."""

from __future__ import annotations

import jax
from flax import nnx
from jaxtyping import Array, Float

from dials_jax.config import ModelConfig
from dials_jax.nn.kernels.dispatch import SWIGLU
from dials_jax.nn.kernels.implementation import dispatch
from dials_jax.nn.linear import array_of, linear
from dials_jax.nn.modules import normal, residual_depth, zeros_if


class MLP(nnx.Module):
    """silu(x W_gate) * (x W_up), or gelu(x W_up), projected back.

    `fused`: the parts in which gate and up are joined: see `dials_jax.nn.fusing`.
    """

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs, fused: int = 0):
        self.kind, self.fused = cfg.mlp, fused if cfg.mlp == "swiglu" else 0
        sizes = {"gate_up": 2 * cfg.d_ff} if self.fused else {"gate": cfg.d_ff, "up": cfg.d_ff}
        if cfg.mlp == "gelu":
            del sizes["gate"]
        for name, size in sizes.items():
            setattr(self, name, nnx.Param(normal(rngs, (cfg.d_model, size))))
            setattr(self, f"{name}_bias", zeros_if(cfg.mlp_bias, (size,)))
        self.down = nnx.Param(normal(rngs, (cfg.d_ff, cfg.d_model), depth=residual_depth(cfg)))
        self.down_bias = zeros_if(cfg.mlp_bias, (cfg.d_model,))

    @jax.named_scope("mlp")
    def __call__(
        self, x: Float[Array, "B T D"], added_to: Float[Array, "B T D"] | None = None
    ) -> Float[Array, "B T D"]:
        """Args: added_to: the residual stream; None: the output is returned by itself."""
        return linear(self.hidden(x), self.down, self.down_bias, split=True, added_to=added_to)

    def hidden(self, x: Float[Array, "B T D"]) -> Float[Array, "B T F"]:
        if self.kind == "gelu":
            return jax.nn.gelu(linear(x, self.up, self.up_bias), approximate=True)
        if self.fused:
            kernels, biases = (self.gate_up,), (self.gate_up_bias,)
        else:
            kernels, biases = (self.gate, self.up), (self.gate_bias, self.up_bias)
        biases = tuple(bias if bias is None else array_of(bias) for bias in biases)
        return dispatch(SWIGLU, x, tuple(map(array_of, kernels)), biases, self.fused)
