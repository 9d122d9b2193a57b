"""Trains, evaluates and studies tiny models as one of several processes.

`test_processes.py` starts two of it, which share a folder, and compares what they leave with what
one process alone does. Usage: python process_worker.py NUMBER COUNT PORT FOLDER ADDRESS, the last
of a bucket, where a copy of the model's workdir is kept.
"""

import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
from jax._src import compiler, distributed

from dials_jax import mirror, stored
from dials_jax.commands import CommandLine
from dials_jax.config import (
    ArithmeticData,
    EvalConfig,
    EvalTask,
    MeshConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RouterConfig,
    ScheduleStudy,
    TrainConfig,
)
from dials_jax.errors import InputError
from dials_jax.evaluation import scoring
from dials_jax.evaluation.sweep import sweep
from dials_jax.mirror import mirrored
from dials_jax.models import families
from dials_jax.reporting import publish
from dials_jax.sharding import require_same_everywhere
from dials_jax.stopping import Request, Stopped
from dials_jax.studies import perplexity_run
from dials_jax.studies.study import run_study
from dials_jax.training import checkpoint, host_copy, loop, run
from dials_jax.training.loop import train
from tests import conftest  # noqa: F401  exact products

DATA = ArithmeticData(num_items=40)


def tiny(causal=False):
    return families.mdlm_small(
        2, 32, 19, mask_id=18, eos_id=1, pad_id=0, max_length=32, dtype="float32", causal=causal
    )


def training(mesh, **subject):
    return TrainConfig(
        **(subject or {"model": tiny(), "dropout": 0.1}),
        router=RouterConfig(d_hidden=8, execute_bias=0.5),
        data=DATA,
        optimizer=OptimizerConfig(learning_rate=1e-2, num_steps=4, warmup_steps=1, ema=0.9),
        objective=ObjectiveConfig(kind="mdlm"),
        mesh=mesh,
        batch_size=4,
        save_every=2,
        log_every=2,
    )


def work(folder: Path, mesh: MeshConfig) -> None:
    """Parameters are split over `mesh` in training; evaluation splits rows over all devices.

    A causal model, which scores samples, stands beside `folder`. Nothing is drawn: it is slow, and
    tested beside the plots.
    """
    with mock.patch.object(publish, "draw_figures", lambda figures, folder: {}):
        work_without_figures(folder, mesh)


def work_without_figures(folder: Path, mesh: MeshConfig) -> None:
    train(training(mesh), folder / "model")
    checked = {"validation": DATA, "validation_batches": 1, "fit_execution": (0.5,)}
    with mock.patch.object(stored, "_what_waits", lambda: None):
        train(training(mesh, backbone=str(folder / "model"), **checked), folder / "router")
    task = EvalTask(name="sums", metric="exact_match", data=DATA, limit=5)
    bound = EvalTask(name="bound", metric="nelbo", data=DATA, limit=3, num_samples=4)
    evaluation = EvalConfig(
        model=str(folder / "model"),
        tasks=(task, bound),
        routers=(str(folder / "router"),),
        num_static=(1,),
        num_random=(),
        batch_size=4,
    )
    sweep(evaluation, folder / "sweep")
    run_study(
        ScheduleStudy(
            models=(("H", str(folder / "model")), ("L", str(folder / "model"))),
            static_layers=(("L", "1"),),
            scorer=str(folder.parent / "scorer"),
            retokenize="never",
            schedules=("H4", "L1,H3"),
            length=12,
            steps=4,
            num_samples=3,
            batch_size=2,
            dtype="float32",
            layout="stacked",
        ),
        folder / "study",
    )


def work_mirrored(folder: Path, mesh: MeshConfig, address: str) -> None:
    with mirrored(folder / "model", f"{address}/model"):
        work(folder, mesh)


def join(number: str, count: str, port: str, folder: str) -> Path:
    """Joins the others as a command does whose options name them."""
    hosts = ["--coordinator", f"localhost:{port}", "--num-processes", count]
    options = ["--config", "none", "--workdir", folder, *hosts, "--process-index", number]
    return CommandLine.read("", options).folder()


def keep_all_programs() -> None:
    """The compilation cache takes programs of every process.

    JAX writes those of the first one only, and the others' have keys of their own: they would be
    compiled again in every run.
    """
    written_as = SimpleNamespace(process_id=0, client=distributed.global_state.client)
    compiler.distributed = SimpleNamespace(global_state=written_as)


def differ(what: str) -> None:
    """Says on each process how a value is refused that is not the same on all."""
    try:
        require_same_everywhere({"seeds": 1, what: jax.process_index()})
    except InputError as error:
        print(f"refused: {error}", flush=True)


def sigterm_in(module, name: str):
    """The last process gets a SIGTERM whenever it calls the function."""
    function = getattr(module, name)

    def signalled(*args, **kwargs):
        if is_last():
            signal.raise_signal(signal.SIGTERM)
        return function(*args, **kwargs)

    return mock.patch.object(module, name, signalled)


class Interrupted(Request):
    """The last process gets a SIGTERM as soon as that is noted."""

    def start(self) -> None:
        super().start()
        if is_last():
            signal.raise_signal(signal.SIGTERM)


def is_last() -> bool:
    return jax.process_index() == jax.process_count() - 1


def keep_apart(folder: Path, address: str) -> None:
    """Says on each process how a copy is refused of workdirs that they do not share."""
    try:
        with mirrored(folder / f"apart{jax.process_index()}", address):
            pass
    except InputError as error:
        print(f"refused: {error}", flush=True)


def noting_threads():
    """Prints which thread saves each checkpoint."""
    save_tree = checkpoint.save_tree

    def noted(*args, **kwargs):
        print(f"saved by {threading.current_thread().name}", flush=True)
        save_tree(*args, **kwargs)

    return mock.patch.object(checkpoint, "save_tree", noted)


def fail_to_save(mesh: MeshConfig, folder: Path) -> None:
    """Says on each process how a training ends whose first save fails on the last one: in a thread,
    and where the state is too large for that."""
    save_tree = checkpoint.save_tree

    def fail(*args, **kwargs):
        if is_last():
            raise InputError("the disk is full")
        save_tree(*args, **kwargs)

    for pinned_bytes in (host_copy.PINNED_BYTES, 0):
        with (
            mock.patch.object(checkpoint, "save_tree", fail),
            mock.patch.object(host_copy, "PINNED_BYTES", pinned_bytes),
        ):
            try:
                train(training(mesh), folder)
            except InputError as error:
                print(f"failed: {error}", flush=True)
        print(f"kept {[path.name for path in (folder / 'checkpoints').glob('*[0-9]')]}", flush=True)


def stop_before_the_first_step(mesh: MeshConfig, folder: Path) -> None:
    with sigterm_in(loop, "prepare_run"):
        ended_by_a_signal(partial(train, training(mesh), folder))


def ended_by_a_signal(run: Callable[[], Any]) -> None:
    """Prints how the run ended and what it has kept."""
    try:
        run()
    except Stopped as stop:
        print(f"stopped ({stop.status}): {stop.message}", flush=True)


def stopped_in(module, name: str, run: Callable[[Any, Path], Any]):
    """The run, which is stopped in its first batch and continued: `name` scores a batch."""

    def twice(settings, folder: Path) -> None:
        with sigterm_in(module, name):
            ended_by_a_signal(partial(run, settings, folder))
        lines = (folder / "runs.jsonl").read_text().splitlines()
        batches = sum('"flops"' in line for line in lines)  # beside what was found to choose layers
        print(f"{folder.name} has kept {batches}", flush=True)
        run(settings, folder)

    return mock.patch.object(sys.modules[__name__], run.__name__, twice)


if __name__ == "__main__":
    *joining, address = sys.argv[1:]
    folder = join(*joining)
    keep_all_programs()
    mesh = MeshConfig(data=1, fsdp=jax.process_count())
    stop_before_the_first_step(mesh, folder.with_name("stopped"))
    with (
        sigterm_in(run, "save_model"),  # which all are about to end anyway
        stopped_in(scoring, "make_batch_record", sweep),
        stopped_in(perplexity_run, "score_samples", run_study),
        mock.patch.object(mirror, "Request", Interrupted),
        noting_threads(),
    ):
        ended_by_a_signal(partial(work_mirrored, folder, mesh, address))
    differ("requests")
    keep_apart(folder, f"{address}/apart")
    fail_to_save(mesh, folder.with_name("failed"))
