"""What fits is told from what does not, and changes are tried until one fits."""

import time
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from dials_jax import sharding
from dials_jax.errors import InputError
from dials_jax.pods import fitting, topology
from dials_jax.pods.fitting import Fit, StepTime, fit_run, step_time
from dials_jax.pods.footprint import Collective, Footprint
from dials_jax.pods.programs import PodProgram
from dials_jax.pods.topology import CHIPS, Pod, cpu_devices, find_pod
from dials_jax.progress import still_at


def program_of(size):
    """Reads and writes so many bytes."""
    lower = partial(jax.jit(jnp.negative).lower, jax.ShapeDtypeStruct((size,), jnp.int8))
    return PodProgram(f"{size} bytes", sharding.make_mesh(), lower, 100.0, 10)


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(topology, "device_memory", lambda: 1000.0)
    return Pod("cpu:1", jax.devices()[:1])


def run(pod, sizes, knobs=()):
    lines = []
    fits = fit_run(
        sizes,
        pod,
        lambda sizes, pod: [program_of(size) for size in sizes],
        lambda sizes, pod: iter(knobs),
        lines.append,
        lines.append,
    )
    return fits, lines


def test_all_that_fits_is_reported_and_nothing_is_tried(here):
    def refuse(sizes, pod):
        raise AssertionError("tried")

    lines = []
    programs = lambda sizes, pod: [program_of(size) for size in sizes]  # noqa: E731
    assert fit_run((100, 400), here, programs, refuse, lines.append)
    text = "\n".join(lines)
    assert text.startswith("cpu:1: 1 x cpu, mesh data 1 x fsdp 1 x tensor 1; nothing is run")
    assert "100 bytes" in text and "400 bytes" in text and "does not fit" not in text
    assert "collectives: none" in text and "time:" not in text  # of a CPU no peak is known


def test_changes_are_tried_until_one_fits(here):
    knobs = [("--a", (100, 600)), ("--b", (100, 200)), ("--c", (100, 100))]
    fits, lines = run(here, (100, 900), knobs)
    assert not fits
    assert [line for line in lines if line.startswith("  --")] == [
        "  --a: does not fit, 0.0 MB of 0.0 MB per device",
        "  --b: fits, 0.0 MB of 0.0 MB per device",
    ]
    assert lines[-1] == "it fits with --b"


def test_it_says_so_if_no_change_is_enough(here):
    fits, lines = run(here, (900,), [("--a", (800,))])
    assert not fits and lines[-1].startswith("none of these is enough; give more devices")


def test_settings_that_do_not_go_together_are_left_out(here):
    def programs(sizes, pod):
        if sizes[0] == 1:
            raise InputError("it does not divide")
        return [program_of(size) for size in sizes]

    lines, knobs = [], [("--a", (1,)), ("--b", (100,))]
    fit_run((900,), here, programs, lambda sizes, pod: iter(knobs), lines.append, lines.append)
    assert "  --a: not possible (it does not divide)" in lines
    assert lines[-1] == "it fits with --b"


def test_a_compilers_refusal_is_no_error(here, monkeypatch):
    def refuse(self):
        raise jax.errors.JaxRuntimeError("Ran out of memory. Used 20.5G of 15.75G hbm.")

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    fits, lines = run(here, (100,))
    assert not fits
    assert "  memory: does not fit: it needs 22.0 GB, and a device has 16.9 GB" in lines


def test_a_step_is_bounded_by_products_memory_and_network():
    chip = CHIPS["TPU v5 lite"]
    sent = {Collective("all-gather", 200, 2): 3, Collective("all-reduce", 100, 2): 1}
    footprint = Footprint(kept=500, peak=900, largest_collective=200, collectives=sent)
    times = step_time(program_of(1)._replace(passes=4), footprint, chip)
    expected = StepTime(100 / chip.flops, 4 * 500 / chip.bandwidth, (300 + 100) / chip.network)
    assert times == pytest.approx(expected)
    pod = Pod("v5e:1x1", [type("Chip", (), {"device_kind": "TPU v5 lite"})])
    line = fitting.describe(program_of(1), Fit(900, 1e9, footprint, 1.0), pod)[-1]
    assert line.startswith("  time: at least") and "estimate at the chip's peak rates" in line


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e", "--compile-for='v5e' is no pod; give one such as v5e:4x4"),
        ("cpu:0", "of fake devices give a number up to 1024, as cpu:8"),
        ("cpu:2x4", "of fake devices give a number up to 1024"),
        ("2xcpu:4", "of fake devices give a number up to 1024"),
        ("v5e:4x4", "the TPU compiler is missing; install it with pip install 'dials_jax"),
    ],
)
def test_other_names_are_refused_in_a_line(name, message, monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError) as refused:
        find_pod(name)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_fake_devices_must_be_asked_for_before_jax_starts():
    count = len(jax.devices())
    assert len(cpu_devices(1)) == 1
    with pytest.raises(InputError, match=f"has started with {count} devices"):
        cpu_devices(count + 1)


def test_a_long_compilation_says_that_it_goes_on():
    lines = []
    with still_at("compiling a step", lines.append, every=0.01):
        time.sleep(0.1)
    assert lines and lines[0] == "compiling a step: 1 s so far"
    count = len(lines)
    time.sleep(0.05)
    assert len(lines) == count


@pytest.mark.parametrize(
    "name, bounds",
    [("v5e:1x2", (1, 2, 1)), ("v5p:1x1x2", (1, 1, 2)), ("v5e:2x2", None), ("2xv5e:1x2", None)],
)
def test_parts_of_a_host_have_bounds_of_their_own(name, bounds, monkeypatch):
    """The compiler knows v5e:2x2 and up; of less it has to be told that no more chips are there."""
    told = []

    def describe(topology, platform, **how):
        told.append(how.get("chips_per_host_bounds"))
        return SimpleNamespace(devices=[object()])

    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(topologies, "get_topology_desc", describe)
    find_pod(name)
    assert told == [bounds]
