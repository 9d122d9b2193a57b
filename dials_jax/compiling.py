"""How programs are compiled, and functions whose run time is measured without compilation."""

from __future__ import annotations

import contextlib
import functools
import os
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

from dials_jax.errors import require

KERNELS = "DIALS_KERNELS"  # the variable that chooses kernels: see `nn.kernels.implementation`
# Whether programs are traced and compiled so that a sequence's result depends on no other one of
# its batch: see `nn.kernels.implementation`. A part of the key of every trace, as the mesh is.
batch_invariant = jax.make_user_context(False)


def compiler_options() -> dict[str, Any] | None:
    """Options for `jax.jit` and `compile`, or None. Call it after the backend is chosen.

    On GPUs cuBLAS computes all matmuls. XLA would choose Triton's where they are faster in
    isolation, but then it may add a residual in a separate pass, which cuBLAS does within the
    matmul: MDLM's sampling took 9 to 11 % longer with Triton's on one H100.

    Where results may not depend on the batch, every number is rounded to the type it has in the
    program. XLA would leave roundings out within a fused loop, and what it fuses depends on shapes.
    """
    options: dict[str, Any] = {}
    if jax.default_backend() == "gpu":
        options["xla_gpu_enable_triton_gemm"] = False
    if batch_invariant.value:
        options["xla_allow_excess_precision"] = False
    return options or None


def require_32_bits() -> None:
    """Raises: InputError where JAX makes numbers of 64 bits, which nothing here is written for."""
    require(
        not jax.config.jax_enable_x64,
        "JAX is set to 64 bits; leave out JAX_ENABLE_X64 and jax_enable_x64, or set them to False",
    )


class Timed:
    """A jitted function that returns its result and the seconds it took to run.

    Compiled once per combination of static arguments, shapes, shardings, matmul precision,
    `batch_invariant` and choice of kernels. The call waits for the result, so it belongs around
    whole generations and batches, not in a loop.
    """

    def __init__(
        self, fn: Callable, static_argnames: tuple[str, ...] = (), donate: tuple[str, ...] = ()
    ):
        """Args: donate: names of arguments whose memory the result may take; they are then gone."""
        functools.update_wrapper(self, fn)
        self._static, self._donate = static_argnames, donate
        self._jitted: dict[Any, Callable] = {}
        self._programs: dict[Any, Any] = {}
        self.compile_seconds = 0.0
        _ALL.add(self)

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, float]:
        program = self.program(*args, **kwargs)
        dynamic = {k: v for k, v in kwargs.items() if k not in self._static}
        jax.block_until_ready((args, dynamic))
        start = time.perf_counter()
        out = jax.block_until_ready(program(*args, **dynamic))
        return out, time.perf_counter() - start

    @property
    def num_programs(self) -> int:
        return len(self._programs)

    def trace(self, *args: Any, **kwargs: Any) -> jax.stages.Traced:
        """The program as JAX has traced it."""
        require_32_bits()
        # JAX's own cache of traces does not know the choice of kernels.
        key = os.environ.get(KERNELS), _classes(jax.tree.structure((args, kwargs)))
        if key not in self._jitted:
            self._jitted[key] = jax.jit(
                _another(self.__wrapped__),
                static_argnames=self._static,
                donate_argnames=self._donate,
            )
        return self._jitted[key].trace(*args, **kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> jax.stages.Lowered:
        """The program before it is compiled; it may be for devices of another machine."""
        return self.trace(*args, **kwargs).lower()

    def program(self, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        """The compiled program for such arguments; it takes only those that are not static.

        Calling it returns at once, so several programs run one after another without waiting.
        """
        return self.programs([(args, kwargs)])[0]

    def programs(self, calls: Sequence[tuple[tuple, dict[str, Any]]]) -> list[Callable[..., Any]]:
        """The compiled programs of several calls; those that are missing are compiled together.

        Tracing takes turns, but XLA compiles each program on a core of its own.

        Args:
          calls: arguments, by position and by name.
        """
        start, missing = time.perf_counter(), {}
        keys = [self._key(args, kwargs) for args, kwargs in calls]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for key, (args, kwargs) in zip(keys, calls, strict=True):
                if key not in self._programs and key not in missing:
                    lowered = self.lower(*args, **kwargs)
                    missing[key] = pool.submit(lowered.compile, compiler_options())
        if missing:
            self._programs |= {key: compiling.result() for key, compiling in missing.items()}
            self.compile_seconds += time.perf_counter() - start
        found = [self._programs[key] for key in keys]
        for used in _USED:
            used += found
        return found

    def _key(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Equal for calls of one program."""
        # Not the cache of `jax.jit`: that compiles where it is first called, and a generation's
        # programs must all be there before the first of them runs.
        static = tuple(kwargs.get(k) for k in self._static)
        leaves, structure = jax.tree.flatten((args, {**kwargs, **dict.fromkeys(self._static)}))
        shapes = tuple(
            (jnp.shape(x), jnp.result_type(x), getattr(x, "sharding", None)) for x in leaves
        )
        precision = jax.config.jax_default_matmul_precision
        context = jax.sharding.get_abstract_mesh(), batch_invariant.value, precision
        return static, structure, shapes, context, os.environ.get(KERNELS)

    def largest_program(self) -> int:
        """Bytes on a device that the largest program takes: arguments, results and temporaries."""
        return max(map(program_bytes, self._programs.values()), default=0)

    def forget_programs(self) -> None:
        """Drops the compiled programs and the memory they take."""
        self._programs.clear()

    def traced_anew(self, wrap: Callable[[Callable], Callable] = lambda fn: fn) -> Timed:
        """The same function without any program or trace, for tests that patch what it calls.

        Args:
          wrap: put around the function that is traced.
        """
        fn = wrap(self.__wrapped__)
        return Timed(lambda *args, **kwargs: fn(*args, **kwargs), self._static, self._donate)


def _classes(structure: jax.tree_util.PyTreeDef) -> Any:
    """The classes of a tree's nodes; equal only for trees of the same classes.

    JAX takes the structures of two registered dataclasses for equal when they have as many fields
    and equal static ones (until 0.12 at least). Their hashes differ, but the caches of 0.10 do not
    always compare those: in one of some sixty pairs `jax.jit` ran the program of one policy for
    another. So each combination of classes has a function of its own.
    """
    node = structure.node_data()
    return node and (node[0], *map(_classes, structure.children()))


def _another(fn: Callable) -> Callable:
    """The same function as another object: JAX keeps its traces for each object."""

    @functools.wraps(fn)
    def call(*args, **kwargs):
        return fn(*args, **kwargs)

    return call


_ALL: weakref.WeakSet[Timed] = weakref.WeakSet()


_USED: list[list[Any]] = []


@contextlib.contextmanager
def programs_used() -> Iterator[list[Any]]:
    """A list of the programs of `Timed` functions that are used from here on, until it is left."""
    used: list[Any] = []
    _USED.append(used)
    try:
        yield used
    finally:
        _USED[:] = [each for each in _USED if each is not used]


def program_bytes(program: Any) -> int:
    """Bytes on a device that a program takes: arguments, results and temporaries."""
    sizes = program.memory_analysis()
    shared = sizes.alias_size_in_bytes  # results that take the memory of arguments
    return sum(
        (
            sizes.argument_size_in_bytes,
            sizes.output_size_in_bytes,
            sizes.temp_size_in_bytes,
            -shared,
        )
    )


def timed_jit(*static_argnames: str, donate: tuple[str, ...] = ()) -> Callable[[Callable], Timed]:
    """A decorator: the function as a `Timed` one."""
    return lambda fn: Timed(fn, static_argnames, donate)


def total_compile_seconds() -> float:
    """Seconds that the programs of all `Timed` functions have taken to compile so far."""
    return sum(timed.compile_seconds for timed in _ALL)


def largest_program() -> int:
    """Bytes on a device that the largest program of all `Timed` functions takes."""
    return max((timed.largest_program() for timed in _ALL), default=0)


def forget_programs() -> None:
    """Drops the compiled programs of all `Timed` functions."""
    for timed in list(_ALL):
        timed.forget_programs()
