"""Which implementation of an operation runs: the first of its list that fits.

The last of every list is plain JAX: it says what the operation computes, and fits always.
`DIALS_KERNELS=xla` in the environment, or the argument `implementation`, forces one by its name.
The environment may name several, separated by commas: in each list the one that it has is forced;
in a list without any of them, the first that fits runs. `DIALS_KERNELS=-cudnn` leaves one out. The
environment is read when a program is traced.

The batch-invariant mode (`compiling.batch_invariant`) chooses among implementations whose sums have
an order of their own: a row is summed alike wherever it stands and however many rows there are. So
a sequence's result depends on no other one of its batch, bit by bit.

The lists: `nn.kernels.dispatch`, and beside what they compute in `nn.linear`, `nn.norm`, `nn.rope`
and `nn.kernels.row_sums`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from typing import Any, Literal, NamedTuple

from dials_jax.compiling import KERNELS, batch_invariant
from dials_jax.errors import nearest, require
from dials_jax.nn.kernels.per_device import ANY, HOPPER, Device

NAMES = (
    "tpu_splash", "hopper_window", "cudnn", "hopper_swiglu", "hopper_matmul", "sharded", "xla",
    "hopper_rows", "hopper_peers", "hopper_xla", "tiles",
)  # fmt: skip
When = Literal["by default", "invariant", "both"]


class Implementation(NamedTuple):
    """One way to compute an operation.

    Attributes:
      device: that it is written for.
      limits: of the same arguments as `run`: why it cannot take them on its device; None: it can.
      when: in which mode it may run: by default, the fastest kernel counts; in the batch-invariant
        one, only those whose sums have one order in any batch.
    """

    name: str
    device: Device
    limits: Callable[..., str | None]
    run: Callable[..., Any]
    when: When = "by default"

    def refusal(self, *args: Any) -> str | None:
        """Why it cannot run here; None: it fits."""
        if self.when == "by default" and batch_invariant.value:
            return "its sums may depend on the batch"
        if self.when == "invariant" and not batch_invariant.value:
            return "it is for models that are loaded with batch_invariant=True"
        if not self.device.is_here():
            return f"it needs {self.device.name}"
        return self.limits(*args)


def plain_jax(run: Callable[..., Any], when: When = "by default") -> Implementation:
    """The last of a list, without limits."""
    return Implementation("xla", ANY, lambda *args: None, run, when)


def fixed_tiles(run: Callable[..., Any]) -> Implementation:
    """What takes the place of `plain_jax` in the batch-invariant mode."""
    return Implementation("tiles", ANY, lambda *args: None, run, "invariant")


def alike_on_hopper(run: Callable[..., Any]) -> Implementation:
    """Plain JAX whose bits no batch changes on Hopper GPUs; XLA compiles it by shape on CPUs."""
    return Implementation("hopper_xla", HOPPER, lambda *args: None, run, "invariant")


def dispatch(
    implementations: tuple[Implementation, ...], *args: Any, implementation: str | None = None
) -> Any:
    """Runs the first implementation that fits the arguments, or the one that is forced.

    Args:
      implementation: the name of the one to run; None: chosen by the environment.

    Raises: InputError for an unknown name, and for one that is forced and does not fit.
    """
    return pick(implementations, *args, implementation=implementation).run(*args)


def pick(
    implementations: tuple[Implementation, ...], *args: Any, implementation: str | None = None
) -> Implementation:
    """The implementation that `dispatch` runs."""
    by_name = {x.name: x for x in implementations}
    if implementation is None:
        name = forced_by_environment(by_name)
        where = f"{KERNELS}={name}"
    else:
        name, where = implementation, f"implementation={implementation!r}"
        require(name in by_name, f"{where} is unknown{nearest(name, by_name)}")
    if name is None:
        allowed = (x for x in implementations if not left_out_by_environment(x.name))
        found = next((x for x in allowed if x.refusal(*args) is None), None)
        require(found is not None, f"{KERNELS} leaves out all that fits of {', '.join(by_name)}")
        return found
    why = by_name[name].refusal(*args)
    instead = "leave the choice out" if batch_invariant.value else "'xla' always does"
    require(why is None, f"{where} does not fit: {why}; {instead}")
    return by_name[name]


def check_kernel_choice() -> None:
    """Raises: InputError for a choice that has an unknown name."""
    _names_in_environment()


def forced_by_environment(names: Collection[str]) -> str | None:
    """The first of these names that the environment forces; None: it forces none of them."""
    return next((name for name in _names_in_environment() if name in names), None)


def left_out_by_environment(name: str) -> bool:
    return f"-{name}" in _names_in_environment()


def _names_in_environment() -> list[str]:
    """Raises: InputError for an unknown name."""
    names = [name for name in os.environ.get(KERNELS, "").split(",") if name]
    for name in names:
        known = name.removeprefix("-")
        require(known in NAMES, f"{KERNELS}: {known!r} is unknown{nearest(known, NAMES)}")
    return names
