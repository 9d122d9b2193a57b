"""Feed-forward layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dials_jax.config import ModelConfig
from dials_jax.nn.broadcast import shifted
from dials_jax.nn.initializers import normal, residual_depth, zeros_if
from dials_jax.nn.kernels.hopper_swiglu import swiglu, swiglu_fits, swiglu_pays
from dials_jax.nn.kernels.per_device import on_hopper, rows_per_device, splits


class MLP(nnx.Module):
    """silu(x W_gate) * (x W_up), or gelu(x W_up), projected back.

    `fused`: see `dials_jax.nn.fusing`.
    """

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs, fused: bool = False):
        self.kind, self.fused = cfg.mlp, fused and cfg.mlp == "swiglu"
        sizes = {"gate_up": 2 * cfg.d_ff} if self.fused else {"gate": cfg.d_ff, "up": cfg.d_ff}
        if cfg.mlp == "gelu":
            del sizes["gate"]
        for name, size in sizes.items():
            setattr(self, name, nnx.Param(normal(rngs, (cfg.d_model, size))))
            setattr(self, f"{name}_bias", zeros_if(cfg.bias, (size,)))
        self.down = nnx.Param(normal(rngs, (cfg.d_ff, cfg.d_model), depth=residual_depth(cfg)))
        self.down_bias = zeros_if(cfg.bias, (cfg.d_model,))

    @jax.named_scope("mlp")
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return linear(self.hidden(x), self.down, self.down_bias)

    def hidden(self, x: Float[Array, "B T D"]) -> Float[Array, "B T F"]:
        if self.kind == "gelu":
            return jax.nn.gelu(linear(x, self.up, self.up_bias), approximate=True)
        if self.fused and self.gate_up_bias is None and _kernel_pays(x, self.gate_up):
            return rows_per_device(swiglu, x, self.gate_up[...])
        if self.fused:
            gate, up = jnp.split(linear(x, self.gate_up, self.gate_up_bias), 2, axis=-1)
        else:
            gate = linear(x, self.gate, self.gate_bias)
            up = linear(x, self.up, self.up_bias)
        return jax.nn.silu(gate) * up


def linear(
    x: Float[Array, "*B D"], kernel: nnx.Param, bias: nnx.Param | None
) -> Float[Array, "*B F"]:
    y = jnp.einsum("...D,DF->...F", x, kernel[...].astype(x.dtype))
    return y if bias is None else shifted(y, bias[...])


def _kernel_pays(x: Float[Array, "B T D"], gate_up: nnx.Param) -> bool:
    """Whether the kernel is for these GPUs, and for the rows of each."""
    num_devices, _ = splits()
    if not on_hopper() or x.shape[0] % num_devices:
        return False
    own, kernel = x[: x.shape[0] // num_devices], gate_up[...]
    return swiglu_fits(own, kernel) and swiglu_pays(own, kernel)
