"""Two hosts, each with a device of its own, do what one does."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest

import dials_jax as dj
from dials_jax.cli.copy import fetch
from dials_jax.config import MeshConfig
from dials_jax.data.arithmetic import ArithmeticTask
from dials_jax.mirror import OWN
from dials_jax.models.folders import save_model
from tests.bucket_servers import NAME, bucket_servers
from tests.conftest import init_params
from tests.process_worker import DATA, tiny, work

ROOT = Path(__file__).parents[1]
MIRROR = f"gs://{NAME}/two"
QUIET = 60  # seconds without any work: a process that waits for another, which waits, too
TIME = ("tokens_per_second", "seconds", "digest")  # and digests of lines that hold times


@pytest.fixture(scope="module")
def folders(made_once):
    """What one process left, what two left, and what those printed."""
    left = made_once("processes", run_both)
    return left / "one", left / "two", [(left / f"{n}.txt").read_text() for n in range(2)]


def run_both(folder):
    """Runs the work in this process and, beside it, in two."""
    save_scorer(folder)

    def attempt():
        shutil.rmtree(folder / "two", ignore_errors=True)
        with pair(folder) as processes:
            if not (folder / "one").exists():
                work(folder / "one", MeshConfig())
            stacks = standstill(processes)
            fetch_copy(folder, processes)
        return processes, stacks

    run_to_the_end(attempt, folder)


def run_to_the_end(attempt, logs):
    """Runs processes that join each other, once more if they stand still.

    Between processes on CPUs, XLA has stood still twice in some hundreds of these runs, both
    processes waiting inside one program, and nobody could make it do so again. Such processes show
    their stacks as a warning and are started once more; a second time fails.

    Args:
      attempt: starts them, and returns them and their stacks if they stand still.
      logs: the folder of what they print.
    """
    processes, stacks = attempt()
    if stacks:
        warnings.warn(f"processes stood still and were started again\n{stacks}", stacklevel=2)
        processes, stacks = attempt()
    count = len(processes)
    ends = "\n".join(f"--- {n}\n{(logs / f'{n}.txt').read_text()[-6000:]}" for n in range(count))
    assert not stacks, f"processes stood still again\n{stacks}\n{ends}"
    assert [process.returncode for process in processes] == [0] * count, ends


@contextlib.contextmanager
def pair(folder):
    """Two processes that share `folder / "two"` and a bucket, and print to `0.txt` and `1.txt`."""
    worker = [str(ROOT / "tests" / "process_worker.py")]
    with bucket_servers(["gs"]), started(worker, folder / "two", 2, folder, MIRROR) as processes:
        yield processes


@contextlib.contextmanager
def started(program, workdir, count, logs, *more, devices=1):
    """Processes of one program, which print to `0.txt` and so on in `logs`."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    environment["XLA_FLAGS"] += f" --xla_force_host_platform_device_count={devices}"
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context((logs / f"{n}.txt").open("w")) for n in range(count)]
        processes = [
            subprocess.Popen(
                [sys.executable, *program, str(n), str(count), str(port), str(workdir), *more],
                env=environment, stdout=outputs[n], stderr=subprocess.STDOUT,
            )
            for n in range(count)
        ]  # fmt: skip
        for process in processes:
            stack.callback(process.wait)
            stack.callback(process.kill)
        yield processes


def fetch_copy(folder, processes):
    """What the bucket has of the model's workdir, into `folder / "copy"`."""
    if all(process.returncode == 0 for process in processes):
        fetch(f"{MIRROR}/model", str(folder / "copy"))


def standstill(processes):
    """Waits until all have ended; returns the stacks if they compute nothing for a minute."""
    used, since = cpu_seconds(processes), time.monotonic()
    while any(process.poll() is None for process in processes):
        now = cpu_seconds(processes)
        if now - used > 1:  # one that waits still takes some milliseconds
            used, since = now, time.monotonic()
        elif time.monotonic() - since > QUIET:
            return "\n".join(native_stacks(process.pid) for process in processes)
        time.sleep(0.5)
    return None


def cpu_seconds(processes):
    """What processes have computed; those that have ended count as nothing."""
    total = 0
    for process in processes:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


def native_stacks(pid):
    """Where the threads of a process are, also inside XLA: a line for those in one place."""
    if not shutil.which("gdb"):
        return f"process {pid}: its stacks need gdb"
    command = ["gdb", "-p", str(pid), "-batch", "-ex", "thread apply all bt 20"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=300).stdout
    threads = [
        " < ".join(re.findall(r"^#\d+ +(?:0x\w+ in )?(\S+) ", thread, re.MULTILINE))
        for thread in re.split(r"^Thread ", shown, flags=re.MULTILINE)[1:]
    ]
    return "\n".join([f"process {pid}", *(f"{n} x {x}" for x, n in Counter(threads).items())])


def save_scorer(folder):
    """A causal model, whose perplexity the study takes."""
    ArithmeticTask(DATA).tokenizer.save(folder)
    params, files = init_params(tiny(causal=True)), [folder / "tokenizer.json"]
    save_model(folder / "scorer", tiny(causal=True), params, tokenizer_files=files)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_close(a, b):
    """Equal but for rounding and what was measured in time."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a.keys() - set(TIME):
            assert_close(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_close(x, y)
    elif isinstance(a, float):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5)
    else:
        assert a == b


def test_training_with_split_parameters_is_the_same(folders):
    one, two, _ = folders
    for name in ("model", "router"):
        assert_close(*(lines(folder / name / "metrics.jsonl") for folder in (one, two)))
    models = [dj.load(folder / "model") for folder in (one, two)]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), *(m.params for m in models)
    )


ALONE = """
import sys
from pathlib import Path
from tests.process_worker import MeshConfig, train, training
for folder in sys.argv[1:]:
    train(training(MeshConfig(data=1, fsdp=2)), Path(folder))
"""


def test_two_processes_train_bitwise_as_one_with_two_devices_which_goes_on_where_they_were(
    folders, tmp_path
):
    _, two, _ = folders
    alone, continued = tmp_path / "alone", tmp_path / "continued"
    copy_as_of_step_2(two / "model", continued)
    devices = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": devices}
    command = [sys.executable, "-c", ALONE, str(alone), str(continued)]
    said = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert "from step 2" in said.stdout
    expected = left_by(two / "model")
    assert left_by(alone) == expected and left_by(continued) == expected


JOINED = """
import sys
from tests.process_worker import MeshConfig, join, keep_all_programs, train, training
folder = join(*sys.argv[1:])
keep_all_programs()
train(training(MeshConfig(data=1, fsdp=4)), folder)
"""


def test_four_processes_go_on_where_two_were_bitwise_as_one_that_joins_as_all(folders, tmp_path):
    """Of four numbers, Gloo adds in another order than XLA does within a process. A process that
    joins as the only one adds by Gloo, too."""
    left = []
    for count in (4, 1):
        folder = tmp_path / str(count)
        workdir = folder / "model"

        def attempt(count=count, folder=folder, workdir=workdir):
            shutil.rmtree(folder, ignore_errors=True)
            copy_as_of_step_2(folders[1] / "model", workdir)
            each = 4 // count
            with started(["-c", JOINED], workdir, count, folder, devices=each) as processes:
                return processes, standstill(processes)

        run_to_the_end(attempt, folder)
        said = (folder / "0.txt").read_text()
        assert "4 cpu device(s)" in said and "from step 2" in said
        left.append(left_by(workdir))
    assert left[0] == left[1]


def copy_as_of_step_2(workdir, folder):
    """A workdir as a training that was stopped after its second step leaves it."""
    kept = Path("checkpoints") / "00000002"
    shutil.copytree(workdir / kept, folder / kept)
    shutil.copy(workdir / "config.json", folder)
    first = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)[0]
    (folder / "metrics.jsonl").write_text(first)


def left_by(workdir):
    """Metrics without their times, and the digests of the last state."""
    metrics = [
        {k: v for k, v in x.items() if k not in TIME} for x in lines(workdir / "metrics.jsonl")
    ]
    return metrics, (workdir / "checkpoints" / "00000004" / "digest.json").read_text()


def test_checkpoints_are_saved_beside_training(folders):
    """Those of the model; those of the router as with a version of Orbax that does not allow it."""
    for output in folders[2]:
        savers = [x for x in output.splitlines() if x.startswith("saved by")]
        assert savers == ["saved by checkpoint_0"] * 2 + ["saved by MainThread"] * 2


def test_a_save_that_fails_on_one_process_ends_all(folders):
    lines = [
        "failed: process 1 has stopped; its message says why",
        "failed: the disk is full",
    ]
    for line, output in zip(lines, folders[2], strict=True):
        ends = [x for x in output.splitlines() if x.startswith(("failed", "kept"))]
        assert ends == [line, "kept []"] * 2  # saves in a thread, and such as training waits for


def test_a_sweep_gives_every_item_the_same_score(folders):
    one, two, _ = folders
    runs = [json.loads((x / "sweep" / "results.json").read_text())["runs"] for x in (one, two)]
    assert len(runs[0]) == 6
    for a, b in zip(*runs, strict=True):
        for run in (a, b):  # digests of a router that either folder trained itself
            for name in {"router", "training"} & run["policy"].keys():
                del run["policy"][name]
        for name in ("task", "policy", "items", "examples", "execution"):
            assert_close(a[name], b[name])


def test_a_study_draws_and_writes_every_sample_once(folders):
    one, two, outputs = folders
    assert_close(*(lines(folder / "study" / "runs.jsonl") for folder in (one, two)))
    assert (two / "study" / "results.csv").exists()
    shown = [("gen. PPL" in output, "full: " in output) for output in outputs]
    assert shown == [(True, True), (False, False)]  # the first process speaks for all


def test_processes_end_together_when_one_is_asked_to(folders):
    """Before the first step; a SIGTERM while the model is written lets all write it to the end."""
    line = "stopped (143): no step is saved yet; the same command starts again"
    assert [output.splitlines().count(line) for output in folders[2]] == [1, 1]


@pytest.mark.parametrize("kind", ["sweep", "study"])
def test_an_evaluation_ends_on_all_processes_after_the_batch_in_which_one_is_asked_to(
    kind, folders
):
    """What the others test of its results is what the same call has made of that."""
    for output in folders[2]:
        lines = output.splitlines()
        assert lines[lines.index(f"{kind} has kept 1") - 1].endswith("stopped (143): ")


def test_the_first_of_two_copies_the_workdir_into_a_bucket(folders):
    _, two, outputs = folders
    found, copied = (
        {x.relative_to(y): x.read_bytes() for x in y.rglob("*") if x.is_file()}
        for y in (two / "model", two.with_name("copy"))
    )
    assert {n: x for n, x in found.items() if not n.name.startswith(OWN)} == {
        n: x for n, x in copied.items() if not n.name.startswith(OWN)
    }
    assert Path("checkpoints/00000004/digest.json") in copied
    line = f"copied to {MIRROR}/model"
    assert [output.splitlines().count(line) for output in outputs] == [1, 0]


def test_a_signal_to_one_waits_on_both_until_all_is_copied(folders):
    _, two, outputs = folders
    line = f"stopped (143): {two / 'model'} is copied to {MIRROR}/model"
    assert [output.splitlines().count(line) for output in outputs] == [1, 1]


def test_two_that_share_no_workdir_are_not_copied(folders):
    line = "refused: process 1 of 2 has other files in .*, which all hosts have to share, than"
    assert [len(re.findall(line, output)) for output in folders[2]] == [1, 1]


def test_what_differs_between_processes_is_named_on_all_of_them(folders):
    line = (
        "refused: process 1 of 2 has other requests than the first one; start the same command on "
        "all hosts, with the same files"
    )
    assert [output.splitlines().count(line) for output in folders[2]] == [1, 1]
