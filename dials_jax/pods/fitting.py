"""Compiles the programs of a run for a pod, and says what each takes and what would make it fit."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax

from dials_jax.errors import InputError
from dials_jax.pods.footprint import Footprint, memory_that_is_missing, read_footprint
from dials_jax.pods.programs import Knobs, PodProgram
from dials_jax.pods.topology import Chip, Pod
from dials_jax.progress import format_bytes, format_duration, still_at

Say = Callable[[str], Any]


class Fit(NamedTuple):
    """Whether a program fits a device.

    Attributes:
      needs: bytes.
      has: bytes; None: not known.
      footprint: None where the compiler refuses a program that does not fit.
    """

    needs: int | float
    has: int | float | None
    footprint: Footprint | None
    seconds: float

    @property
    def fits(self) -> bool:
        return self.footprint is not None and (self.has is None or self.needs <= self.has)

    def __str__(self) -> str:
        of = "" if self.has is None else f" of {format_bytes(self.has)}"
        return f"{format_bytes(self.needs)}{of} per device"


class StepTime(NamedTuple):
    """Seconds that one run of a program takes at least, on a chip that does nothing else meanwhile.

    Attributes:
      matmuls: at the peak rate in bfloat16.
      memory: to read its arguments once in every pass.
      network: to send what collectives send, over one axis of the network.
    """

    matmuls: float
    memory: float
    network: float


def compile_program(program: PodProgram, pod: Pod, say: Say) -> Fit:
    """Compiles a program and reads what it takes; says so while that lasts."""
    start = time.perf_counter()
    with still_at(f"compiling {program.label}", say):
        lowered = program.lower()
        try:
            footprint = read_footprint(lowered.compile())
        except jax.errors.JaxRuntimeError as error:
            needs, has = memory_that_is_missing(error)
            return Fit(needs, has, None, time.perf_counter() - start)
    return Fit(footprint.peak, pod.memory, footprint, time.perf_counter() - start)


def step_time(program: PodProgram, footprint: Footprint, chip: Chip) -> StepTime:
    """What bounds one run of a program from below; collectives between slices count as others."""
    sent = sum(size for size, _ in footprint.sent().values())
    return StepTime(
        program.flops / program.mesh.size / chip.flops,
        program.passes * footprint.kept / chip.bandwidth,
        sent / chip.network,
    )


def fit_run(
    settings: Any,
    pod: Pod,
    programs: Callable[[Any, Pod], Sequence[PodProgram]],
    knobs: Callable[[Any, Pod], Knobs],
    say: Say = print,
    progress: Say = lambda line: print(line, file=sys.stderr, flush=True),
) -> bool:
    """Compiles the programs of a run and reports them; of what does not fit, what would help.

    Args:
      programs: those of settings.
      knobs: settings that make them smaller, each with the options that say so.
      progress: is told what happens while a program compiles.

    Returns: whether all programs fit.
    """
    too_large = []
    for number, program in enumerate(programs(settings, pod)):
        if not number:
            say(describe_pod(pod, program))
        fit = compile_program(program, pod, progress)
        for line in describe(program, fit, pod):
            say(line)
        if not fit.fits:
            too_large.append(number)
    if too_large:
        say("what would help, tried by compiling:")
        say(_first_that_fits(_trials(settings, pod, programs, knobs, too_large, say, progress)))
    return not too_large


def _trials(
    settings: Any,
    pod: Pod,
    programs: Callable[[Any, Pod], Sequence[PodProgram]],
    knobs: Callable[[Any, Pod], Knobs],
    numbers: Sequence[int],
    say: Say,
    progress: Say,
) -> Iterable[tuple[str, bool]]:
    """Compiles what does not fit with each change. Yields the options, and whether all fits."""
    for options, changed in knobs(settings, pod):
        try:
            chosen = [programs(changed, pod)[number] for number in numbers]
            fits = [compile_program(program, pod, progress) for program in chosen]
        except InputError as error:  # these settings do not go together
            say(f"  {options}: not possible ({error})")
            continue
        worst = max(fits, key=lambda fit: (not fit.fits, fit.needs))
        say(f"  {options}: {'fits' if worst.fits else 'does not fit'}, {worst}")
        yield options, worst.fits


def _first_that_fits(trials: Iterable[tuple[str, bool]]) -> str:
    for options, fits in trials:
        if fits:
            return f"it fits with {options}"
    return "none of these is enough; give more devices, or devices with more memory"


# ------------------------------------------------------------------------------------------- text


def describe_pod(pod: Pod, program: PodProgram) -> str:
    """The devices and the mesh, in a line."""
    mesh = " x ".join(f"{name} {n}" for name, n in program.mesh.shape.items())
    kind = getattr(pod.devices[0], "device_kind", "device")
    return f"{pod.name}: {len(pod.devices)} x {kind}, mesh {mesh}; nothing is run"


def describe(program: PodProgram, fit: Fit, pod: Pod) -> list[str]:
    """What a program takes, in a few lines."""
    head = f"{program.label} (compiled in {format_duration(fit.seconds)})"
    if fit.footprint is None:
        needs, has = format_bytes(fit.needs), format_bytes(fit.has)
        return [head, f"  memory: does not fit: it needs {needs}, and a device has {has}"]
    found, devices = fit.footprint, program.mesh.size
    kept = f"{format_bytes(found.kept)} of it all the time"
    fits = "" if fit.fits else "does not fit: "
    return [
        head,
        f"  memory: {fits}{fit}, {kept}",
        f"  matmuls: {program.flops:.3g} FLOPs, {program.flops / devices:.3g} per device",
        f"  collectives: {_describe_collectives(found)}",
        *([_describe_time(program, step_time(program, found, pod.chip))] if pod.chip else []),
    ]


def _describe_collectives(found: Footprint) -> str:
    if found.collectives is None:
        return "cannot be read: the compiler is newer than JAX"
    kinds = found.sent().items()
    shown = ", ".join(f"{format_bytes(size)} by {n:,} {kind}" for kind, (size, n) in kinds)
    return f"each device sends {shown}" if shown else "none"


def _describe_time(program: PodProgram, times: StepTime) -> str:
    parts = ", ".join(f"{name} {_seconds(x)}" for name, x in times._asdict().items())
    rate = program.tokens / max(times)
    return (
        f"  time: at least {_seconds(max(times))}, {_seconds(sum(times))} if nothing overlaps "
        f"({parts}); at most {rate:,.0f} tokens/s. An estimate at the chip's peak rates"
    )


def _seconds(value: int | float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms"
