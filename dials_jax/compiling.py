"""What the library asks of XLA, for all programs that multiply matrices."""

from __future__ import annotations

from typing import Any

import jax


def compiler_options() -> dict[str, Any] | None:
    """For `jax.jit` and `compile`; None: nothing. Asked for once the backend is chosen.

    On GPUs cuBLAS makes all products. XLA would take Triton's where those are quicker by
    themselves. A residual may then be added in a pass of its own, which cuBLAS does within the
    product. On one H100 Triton's cost MDLM's sampling 9 to 11 %, its training 1 to 4 %, and a
    forward pass of LLaDA-8B 1 %.
    """
    return {"xla_gpu_enable_triton_gemm": False} if jax.default_backend() == "gpu" else None
