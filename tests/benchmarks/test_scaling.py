"""The scaling benchmark: what it spreads, what it counts as not hidden, and what it refuses."""

import json

import pytest

from benchmarks import command, scaling
from benchmarks.profile import Event, collective_shares


@pytest.fixture(autouse=True)
def quietly(monkeypatch):
    """No compilation cache is set up in the process of the tests."""
    monkeypatch.setattr(command, "keep_programs", lambda: None)


def test_collectives_count_as_exposed_where_nothing_else_runs():
    """Kernels of two streams overlap; times are in seconds."""
    events = [
        Event("nvjet_gemm", 0.0, 4.0),
        Event("ncclDevKernel_AllGather", 3.0, 3.0),  # one second of it under the matmul
        Event(
            "sum_over_peers_kernel_mosaic_gpu_kernel", 5.0, 2.0
        ),  # one second of it under the other one
        Event("loop_fusion", 8.0, 2.0),
    ]
    running, alone = collective_shares(events)
    assert running == pytest.approx(0.4) and alone == pytest.approx(0.3)
    assert collective_shares([]) is None


def test_a_mesh_has_axes_of_equal_size(monkeypatch):
    monkeypatch.setattr(scaling.jax, "devices", lambda: list(range(8)))
    monkeypatch.setattr(scaling.sharding, "make_mesh", lambda cfg, devices: (cfg, len(devices)))
    work = scaling.make_works(2)["dual"]
    names = [name for name, _ in work.meshes([1, 2, 4, 8])]
    assert names == [
        "one device", "data 2", "data 4", "data 8", "tensor 2", "tensor 4", "tensor 8",
        "data 2 x tensor 2",
    ]  # fmt: skip
    for name, (cfg, count) in work.meshes([4]):
        assert cfg.data * cfg.fsdp * cfg.tensor == count == 4, name


def test_a_curve_begins_at_one_device():
    rows = [
        {"work": "dual", "mesh": mesh, "devices": devices}
        for mesh, devices in (("one device", 1), ("data 2", 2), ("tensor 2", 2), ("data 4", 4))
    ]
    one, data2, tensor2, data4 = rows
    assert scaling._curves(rows) == {
        "dual, data": [one, data2, data4], "dual, tensor": [one, tensor2],
    }  # fmt: skip


def test_it_writes_a_row_for_each_number_of_devices(tmp_path):
    out = tmp_path / "out.json"
    arguments = "--works likelihood --model tiny --layers 1 --batch 1 --prompt 8 --block 8"
    more = f"--samples 2 --repeats 1 --out {out} --plot {tmp_path / 'out.png'}"
    assert scaling.main([*arguments.split(), *more.split()]) == 0
    [row] = json.loads(out.read_text())["rows"]
    assert row["devices"] == 1 and row["speedup"] == row["efficiency"] == 1
    assert row["tokens_a_second"] == pytest.approx(2 * 16 / (row["ms"] / 1e3))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--works duall", "work 'duall' is not known; did you mean 'dual'?"),
        ("--counts 64", "--counts 64: this machine has 1 device"),
        ("--repeats 0", "--steps and --repeats must be positive"),
        ("--model tinny", "model 'tinny' is not known; did you mean 'tiny'?"),
    ],
)
def test_what_does_not_fit_gives_one_line(capsys, arguments, message):
    assert scaling.main(["--model", "tiny", *arguments.split()]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
