"""The training loop: one for every kind of training."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dials_jax import sharding, trees
from dials_jax.config import TrainConfig
from dials_jax.config_files import open_config
from dials_jax.data.batches import Batch, TrainingData, batch_at, prefetch, steps_per_epoch
from dials_jax.errors import InputError, require
from dials_jax.estimates import (
    RunEstimate,
    activation_bytes,
    device_bytes,
    kept_bytes,
    print_cost,
    training_flops,
)
from dials_jax.progress import Pace, progress_bar
from dials_jax.stopping import Request, keeping
from dials_jax.training.checkpoint import Checkpoints
from dials_jax.training.metrics import MeteredStep, MetricsWriter
from dials_jax.training.optimizer import make_lr_schedule, make_optimizer, num_steps
from dials_jax.training.run import (
    Run,
    claim_workdir,
    prepare_run,
    require_kept,
    require_own,
    require_same_experiment,
    shared_settings,
    step_folder,
)
from dials_jax.training.step import (
    TrainState,
    init_train_state,
    jit_train_step,
    make_train_step,
    restore_state,
    state_shapes,
)
from dials_jax.training.validation import summarise_validation
from dials_jax.workdir import exclusive


class NonFiniteLoss(InputError):
    """The loss or its gradient became NaN or infinite."""


def train(
    config: TrainConfig | str | Path,
    workdir: str | Path,
    overrides: Mapping[str, Any] | None = None,
) -> TrainState:
    """Trains to the last step, or for `max_minutes` per call, and exports the result.

    `dials_jax.load(workdir)` and `load_router` then read it, and `load_results` its metrics.

    It starts from the newest intact checkpoint in `workdir` if there is one. A run that was stopped
    anywhere and continued by another call ends bitwise as a run that was not stopped. Ctrl-C and
    SIGTERM end the call with a checkpoint of the current step, and leave no trace in the log.

    Args:
      config: settings, or a file with `get_config()`, or the name of a shipped one.
      overrides: other values of its fields, as {"optimizer.num_steps": 100}.

    Raises:
      InputError: for settings or data that do not fit, before any expensive work.
      NonFiniteLoss: naming the step; the last good checkpoint stays.
      Stopped: after Ctrl-C or SIGTERM, with the step that is saved.
    """
    cfg = open_config(config, TrainConfig, overrides or {})
    with exclusive(workdir) as workdir, Request() as request:
        checkpoints = Checkpoints(workdir / "checkpoints", cfg.keep_checkpoints)
        with keeping(lambda: _saved_message(checkpoints)), checkpoints:
            return _train(cfg, workdir, checkpoints, request)


def _train(
    cfg: TrainConfig, workdir: Path, checkpoints: Checkpoints, request: Request
) -> TrainState:
    mesh = sharding.make_mesh(cfg.mesh)
    shards = sharding.num_batch_shards(mesh)
    sequences = cfg.batch_size // cfg.num_microbatches
    require(
        sequences % shards == 0,
        f"{sequences} sequences per microbatch do not divide over {shards} batch shards; change "
        "batch_size, num_microbatches or mesh",
    )
    require_own(workdir, cfg)
    checkpoints.require_own()
    sharding.require_same_everywhere(
        {"settings": shared_settings(cfg), f"checkpoints in {workdir}": checkpoints.steps()}
    )
    run = prepare_run(cfg, mesh)
    sharding.require_same_everywhere({"data or models": run.identity})
    epoch = steps_per_epoch(run.data, cfg.batch_size)
    optimizer, total = make_optimizer(cfg.optimizer, epoch), num_steps(cfg.optimizer, epoch)
    require_same_settings = partial(require_same_experiment, workdir, cfg, run.identity, epoch)
    require_same_settings(step=max(checkpoints.steps(), default=0))
    ema = cfg.optimizer.ema
    start = (run.init, optimizer, mesh, run.prefix)
    shapes = state_shapes(*start, ema=ema, source=run.source)
    state = restore_state(checkpoints.restore, shapes, mesh, run.prefix)
    if state is None:
        state = init_train_state(*start, ema=ema, source=run.source)
    require_same_settings(step=int(state.step))  # an older checkpoint may have been restored
    require_kept(workdir, cfg, int(state.step), total)
    claim_workdir(workdir, cfg, run.identity)
    run = dataclasses.replace(run, source=())  # its memory is needed
    _print_start(cfg, run, state, total, epoch)
    if left := total - int(state.step):
        cost = _estimate(cfg, run, shapes, mesh, left)
        print_cost("training", cost, "lower batch_size, raise num_microbatches, or set remat")

    step = make_train_step(run.loss_fn, optimizer, cfg.seed, cfg.num_microbatches, ema)
    step_fn = jit_train_step(step, state, mesh, run.prefix)
    with jax.set_mesh(mesh):
        state = _run_steps(cfg, run, state, step_fn, total, epoch, checkpoints, workdir, request)
    run.export(workdir, state.result)
    if run.validation and run.validation.last and jax.process_index() == 0:
        print(summarise_validation(run.validation.last, cfg.router), flush=True)
    return state


def _run_steps(
    cfg: TrainConfig,
    run: Run,
    state: TrainState,
    step_fn: Callable,
    total: int,
    epoch: int,
    checkpoints: Checkpoints,
    workdir: Path,
    request: Request,
) -> TrainState:
    """Runs the steps up to `total`. The host waits for the device only when it logs or saves.

    A save goes on beside the next steps; the run ends once its last one is there. It also ends a
    window of means, so that a continued run logs the same values. A signal does not: the window is
    saved with the state, and the continued run ends it.

    A model to keep is written before the checkpoint of its step: a run that is killed between the
    two takes the step again.

    Args:
      epoch: steps per epoch.
      request: to end; it starts with the first step, which takes long to compile.
    """
    request.obey()  # several processes have noted signals since they began
    start = int(state.step)
    if start == 0 and 0 in cfg.keep_models_at:
        run.export(step_folder(workdir, 0), state.result)
    schedule, validation = make_lr_schedule(cfg.optimizer, epoch), run.validation
    load_batch = partial(_load_batch, cfg, run.data, jax.sharding.get_mesh())
    clock, pace, began = Clock(cfg.max_minutes), Pace(total - start, "training"), 0.0
    metered = MeteredStep(step_fn, checkpoints.window)
    with (
        contextlib.closing(MetricsWriter(workdir, start, len(metered.window))) as writer,
        progress_bar(total, start, "routers" if cfg.backbone else "model") as bar,
    ):
        for step, batch in prefetch(load_batch, start, total):
            state, metrics = metered(state, run.frozen, batch)
            clock.start()
            request.start()
            done = step + 1
            bar.update()
            if done - start == 2:  # the first step was compiled
                jax.block_until_ready(metrics)
                pace.measured(1, time.perf_counter() - began)
            saving = done % cfg.save_every == 0 or done == total
            validating = validation is not None and validation.is_due(done, total)
            keeping_model = done in cfg.keep_models_at
            window_ends = saving or validating or keeping_model or done % cfg.log_every == 0
            over = clock.is_over(window_ends)
            window_ends = window_ends or over
            stop = over or request.came(window_ends)
            if window_ends or stop:
                checkpoints.wait(unless_at_work=True)  # an error of the last save ends the run
                saving = saving or stop
                _check_finite(state, workdir)
            if window_ends:
                means = metered.means()
                means |= {"learning_rate": float(schedule(step)), "epoch": done / epoch}
                if validating:
                    means |= validation(state, run.frozen)
                writer.write(done, means)
                validated = validation.last if validation else {}
                bar.set_postfix_str(_summary(means, validated), refresh=False)
            if keeping_model:
                if jax.process_count() > 1:  # they meet in Orbax for one thing at a time
                    checkpoints.wait()
                run.export(step_folder(workdir, done), state.result)
            if saving:
                checkpoints.save(done, state, [] if window_ends else metered.window)
            if window_ends:
                metered.restart()
            # A signal during the save needs no further step.
            if stop or (saving and request.came(True)):
                break
            if done - start == 1:  # saved and validated: the next step is timed alone
                began = time.perf_counter()
        checkpoints.wait()
        request.finish()
        request.obey()
    return state


def _load_batch(cfg: TrainConfig, data: TrainingData, mesh: jax.sharding.Mesh, step: int) -> Batch:
    """The batch of a step, on the devices."""
    where = jax.process_index(), jax.process_count()
    return sharding.place_batch(batch_at(data, cfg.seed, step, cfg.batch_size, *where), mesh)


def _estimate(
    cfg: TrainConfig, run: Run, shapes: TrainState, mesh: jax.sharding.Mesh, num_steps: int
) -> RunEstimate:
    """What the steps take, validation and saving left out. Args: shapes: of the state."""
    model = cfg.model or run.backbone
    length = run.data.rows(np.arange(1))[0].shape[1]
    batch = cfg.batch_size // cfg.num_microbatches // sharding.num_batch_shards(mesh)
    sequences, routers = num_steps * cfg.batch_size, bool(cfg.backbone)
    memory = {
        "weights and state": device_bytes(shapes) + device_bytes(run.frozen),
        "gradients": device_bytes(shapes.params),
        "activations": kept_bytes(model, batch, length, cfg.remat)
        + activation_bytes(model, batch, length, length),
    }
    one = training_flops(model, length, frozen=routers, remat=cfg.remat)
    return RunEstimate(sequences * length, sequences * one, memory)


def _saved_message(checkpoints: Checkpoints) -> str:
    """Returns a line about the step that is saved and how to continue."""
    steps = checkpoints.steps()
    if not steps:
        return "no step is saved yet; the same command starts again"
    return (
        f"step {steps[-1]} is saved in {checkpoints.folder}; the same command continues from there"
    )


class Clock:
    """Measures the time for training; all hosts agree on its end.

    Args:
      minutes: the time for training; None: no limit.
    """

    def __init__(self, minutes: float | None):
        self._minutes = minutes
        self._start: float | None = None

    def start(self) -> None:
        """Starts the clock at the first call, when a step has been compiled."""
        if self._start is None:
            self._start = self.now()

    def is_over(self, meeting: bool) -> bool:
        """Whether the time is over.

        Args:
          meeting: the hosts synchronise now. Without that, several hosts cannot agree: False.
        """
        if self._minutes is None or (jax.process_count() > 1 and not meeting):
            return False
        over = np.array(self.now() - self._start >= 60 * self._minutes)
        if jax.process_count() > 1:
            over = multihost_utils.broadcast_one_to_all(over)
        return bool(over)

    def now(self) -> float:
        """In seconds."""
        return time.perf_counter()


def _check_finite(state: TrainState, workdir: Path) -> None:
    bad = int(state.bad_step)
    if bad >= 0:
        raise NonFiniteLoss(
            f"the loss or its gradient is not finite at step {bad}, batch {bad} of the seeded "
            f"order; the last good checkpoint in {workdir / 'checkpoints'} is untouched; "
            "lower the learning rate or look at that batch"
        )


def _summary(means: dict[str, float], validated: dict[str, float]) -> str:
    """Returns the text beside the progress bar.

    Args:
      validated: the last metrics of held-out data.
    """
    parts = [f"loss {means['loss']:.3f}"]
    parts += [f"ce {means[name]:.3f}" for name in ("masked_ce", "token_ce") if name in means]
    if "skip_rate" in means:
        parts.append(f"skip {means['skip_rate']:.1%}")
    if "validation/execution" in validated:
        parts.append(f"at inference {1 - validated['validation/execution']:.1%}")
    elif "validation/loss" in validated:
        parts.append(f"held out {validated['validation/loss']:.3f}")
    if "tokens_per_second" in means:
        parts.append(f"{means['tokens_per_second']:,.0f} tokens/s")
    return ", ".join(parts)


def _print_start(cfg: TrainConfig, run: Run, state: TrainState, total: int, epoch: int) -> None:
    if jax.process_index():
        return
    trained, frozen = (trees.count_parameters(t) for t in (state.params, run.frozen))
    print(
        f"training {trained:,} parameters ({frozen:,} frozen) on {jax.device_count()} "
        f"{jax.devices()[0].device_kind} device(s): {run.data.num_rows:,} rows, "
        f"{epoch:,} steps per epoch, {total:,} steps in all, from step {int(state.step):,}",
        flush=True,
    )
