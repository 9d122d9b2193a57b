"""What the library asks of XLA, for all programs that multiply matrices."""

from __future__ import annotations

from typing import Any

import jax


def compiler_options() -> dict[str, Any] | None:
    """For `jax.jit` and `compile`; None: nothing. Asked for once the backend is chosen.

    On GPUs cuBLAS makes all products. XLA would take Triton's where those are quicker by
    themselves, and then adds up residuals in passes of their own, which cuBLAS does within the
    product. On one H100 that costs MDLM's sampling 9 %, its training 1 to 4 %, and LLaDA-8B's
    forward pass 1 %.
    """
    return {"xla_gpu_enable_triton_gemm": False} if jax.default_backend() == "gpu" else None
