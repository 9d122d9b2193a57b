"""How programs are compiled, and functions whose run time is measured apart from it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def compiler_options() -> dict[str, Any] | None:
    """For `jax.jit` and `compile`; None: nothing. Asked for once the backend is chosen.

    On GPUs cuBLAS makes all products. XLA would take Triton's where those are quicker by
    themselves. A residual may then be added in a pass of its own, which cuBLAS does within the
    product. On one H100 Triton's cost MDLM's sampling 9 to 11 %, its training 1 to 4 %, and a
    forward pass of LLaDA-8B 1 %.
    """
    return {"xla_gpu_enable_triton_gemm": False} if jax.default_backend() == "gpu" else None


class Timed:
    """A jitted function that returns its result and the seconds it took to run.

    A program is compiled once for each set of static arguments, shapes and placements, and for each
    precision of products that JAX is set to. The call waits for the result, so it belongs around
    whole generations and batches, not inside loops.
    """

    def __init__(self, fn: Callable, static_argnames: tuple[str, ...] = ()):
        self._jitted = jax.jit(fn, static_argnames=static_argnames)
        self._static = static_argnames
        self._programs: dict[Any, Any] = {}
        self.compile_seconds = 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, float]:
        program = self.program(*args, **kwargs)
        dynamic = {k: v for k, v in kwargs.items() if k not in self._static}
        jax.block_until_ready((args, dynamic))
        start = time.perf_counter()
        out = jax.block_until_ready(program(*args, **dynamic))
        return out, time.perf_counter() - start

    def forget(self) -> None:
        """Drops all compiled programs, and the memory they take."""
        self._programs.clear()

    @property
    def num_programs(self) -> int:
        return len(self._programs)

    def lower(self, *args: Any, **kwargs: Any) -> jax.stages.Lowered:
        """The program before it is compiled, which may be for devices that are not here."""
        return self._jitted.lower(*args, **kwargs)

    def program(self, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        """The compiled program for such arguments: it takes those that are not static.

        Called by itself, it returns at once, and several run one after another without a wait.
        """
        static = tuple(kwargs.get(k) for k in self._static)
        leaves, structure = jax.tree.flatten((args, {**kwargs, **dict.fromkeys(self._static)}))
        shapes = tuple(
            (jnp.shape(x), jnp.result_type(x), getattr(x, "sharding", None)) for x in leaves
        )
        precision = jax.config.jax_default_matmul_precision
        key = (static, structure, shapes, jax.sharding.get_abstract_mesh(), precision)
        if key not in self._programs:
            start = time.perf_counter()
            self._programs[key] = self.lower(*args, **kwargs).compile(compiler_options())
            self.compile_seconds += time.perf_counter() - start
        return self._programs[key]
