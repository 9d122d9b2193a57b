"""`--compile-for POD`: compiles what a command would run, for devices that need not be here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


def fit_or_exit(
    settings: Any,
    pod: str,
    programs: Callable[..., Sequence[Any]],
    knobs: Callable[..., Any],
) -> None:
    """Says what the programs of a run take of each device; ends with status 1 if that is too much.

    Args: as those of `fit_run`; pod: its name.
    """
    from dials_jax.pods.fitting import fit_run
    from dials_jax.pods.topology import find_pod, only_compile

    only_compile()
    if not fit_run(settings, find_pod(pod), programs, knobs):
        raise SystemExit(1)
