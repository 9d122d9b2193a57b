"""The training state and the one training step, for every kind of training."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int, PyTree

from dials_jax import sharding, trees
from dials_jax.compiling import compiler_options
from dials_jax.data.batches import Batch
from dials_jax.keys import seed_key
from dials_jax.training.losses import Draws, LossFn, Mean, Metrics
from dials_jax.training.optimizer import update_moving_average


class TrainState(NamedTuple):
    """Everything that training changes.

    Attributes:
      step: steps taken.
      bad_step: the first step whose loss or gradient was not finite, else -1. After it no step
        changes the state, until the host looks.
      average: the moving average of the parameters, or None.
    """

    step: Int[Array, ""]
    params: trees.Params
    opt_state: optax.OptState
    bad_step: Int[Array, ""]
    average: trees.Params | None = None

    def __repr__(self) -> str:
        """A line without arrays; the step has no number where only shapes are known."""
        try:
            step = f"step {int(self.step):,}"
        except TypeError:
            step = "traced"
        return f"TrainState({step}, {trees.count_parameters(self.params):,} parameters)"

    @property
    def result(self) -> trees.Params:
        """The result of training: the moving average, or else the parameters."""
        return self.params if self.average is None else self.average


TrainStep = Callable[[TrainState, trees.Params, Batch], tuple[TrainState, Metrics]]


def init_train_state(
    init: Callable[..., trees.Params],
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    prefix: str = "",
    *,
    ema: float | None = None,
    source: tuple = (),
) -> TrainState:
    """Makes a new state; each array is computed on the devices that will hold it.

    Args:
      prefix: is put before names of parameters to look them up in the sharding table (`routers/`).
      ema: the decay of a moving average of the parameters, which starts equal to them; None: none.
      source: the arguments of `init`: other parameters that it makes these from.
    """
    make = _make_fresh(init, optimizer, ema)
    shardings = train_state_shardings(jax.eval_shape(make, *source), mesh, prefix)
    with jax.set_mesh(mesh):
        return jax.jit(make, out_shardings=shardings)(*source)


def state_shapes(
    init: Callable[..., trees.Params],
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    prefix: str = "",
    *,
    ema: float | None = None,
    source: tuple = (),
) -> TrainState:
    """As `init_train_state`, but returns only shapes, dtypes and shardings; allocates nothing."""
    return with_shardings(jax.eval_shape(_make_fresh(init, optimizer, ema), *source), mesh, prefix)


def with_shardings(state: TrainState, mesh: Mesh, prefix: str = "") -> TrainState:
    """Returns the shapes and dtypes of a state, with the shardings of the sharding table."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        state,
        train_state_shardings(state, mesh, prefix),
    )


@lru_cache(maxsize=16)
def _make_fresh(
    init: Callable[..., trees.Params], optimizer: optax.GradientTransformation, ema: float | None
) -> Callable[..., TrainState]:
    """Returns the function that makes a new state; equal arguments give the same function."""

    def fresh(*source: trees.Params) -> TrainState:
        params = init(*source)
        average = None if ema is None else params
        return TrainState(jnp.int32(0), params, optimizer.init(params), jnp.int32(-1), average)

    return fresh


def restore_state(
    restore: Callable[..., TrainState | None], shapes: TrainState, mesh: Mesh, prefix: str = ""
) -> TrainState | None:
    """Restores a state and lays it out as `shapes`, whether its layers are stored stacked or not.

    Args:
      restore: `Checkpoints.restore`.

    Returns: None if there is no checkpoint.
    """
    layers = shapes.params.get("layers")
    if layers is None:  # routers
        return restore(shapes)
    unrolled = trees.is_unrolled(layers)
    stored = jax.eval_shape(partial(trees.relayout, unrolled=not unrolled), shapes)
    state = restore(shapes, with_shardings(stored, mesh, prefix))
    if state is None or trees.is_unrolled(state.params["layers"]) == unrolled:
        return state
    relayout = partial(trees.relayout, unrolled=unrolled)
    return jax.jit(relayout, out_shardings=train_state_shardings(shapes, mesh, prefix))(state)


def train_state_shardings(state: TrainState, mesh: Mesh, prefix: str = "") -> TrainState:
    """Returns the sharding of every array of a state."""
    return TrainState(
        step=sharding.replicated(mesh),
        params=sharding.param_shardings(state.params, mesh, prefix),
        opt_state=sharding.state_shardings(state.opt_state, state.params, mesh, prefix),
        bad_step=sharding.replicated(mesh),
        average=sharding.param_shardings(state.average, mesh, prefix),
    )


@lru_cache(maxsize=16)
def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    seed: int,
    num_microbatches: int = 1,
    ema: float | None = None,
) -> TrainStep:
    """Returns `step(state, frozen, batch) -> (state, metrics)`, a pure function.

    Every random key is folded from the seed, the step and the sequence's index in the batch. So the
    numbers of microbatches and devices change the result only by rounding. Equal arguments give the
    same function, so that another run in this process finds its compiled program.

    Args:
      ema: the decay of the moving average, if the state has one.
    """

    def step(state: TrainState, frozen: trees.Params, batch: Batch):
        step_key = jax.random.fold_in(seed_key(seed), state.step)

        def gradients(microbatch):
            size = batch.sequence_index.shape[0]
            draws = Draws.of(step_key, microbatch.sequence_index, size, state.step)
            grad_fn = jax.grad(loss_fn, has_aux=True)
            return grad_fn(state.params, frozen, microbatch, draws)

        grads, metrics = sum_over_microbatches(
            gradients, split_microbatches(batch, num_microbatches)
        )
        # Divided once, by all sequences of the batch.
        grads = jax.tree.map(lambda g: g / batch.sequence_index.shape[0], grads)
        norm = optax.tree.norm(grads)
        good = jnp.isfinite(metrics["loss"].total) & jnp.isfinite(norm)
        metrics |= {"grad_norm": Mean(norm, jnp.ones_like(norm))}
        return update_state(optimizer, state, grads, good, ema), metrics

    return step


def jit_train_step(step: TrainStep, state: TrainState, mesh: Mesh, prefix: str = "") -> Callable:
    """Returns the step as a program that reuses the memory of its argument `state`.

    Args:
      state: the first state, or its shapes and dtypes.
    """
    return jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(train_state_shardings(state, mesh, prefix), None),
        compiler_options=compiler_options(),
    )


def update_state(
    optimizer: optax.GradientTransformation,
    state: TrainState,
    grads: trees.Params,
    good: Bool[Array, ""],
    ema: float | None = None,
) -> TrainState:
    """Returns the next state. From the first step that is not `good` (finite) it stays as it is."""
    good = good & (state.bad_step < 0)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    average = state.average
    if average is not None:
        average = update_moving_average(average, params, state.step + 1, ema)
    new = TrainState(state.step + 1, params, opt_state, state.bad_step, average)
    old = state._replace(bad_step=jnp.where(state.bad_step < 0, state.step, state.bad_step))
    return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)


def sum_over_microbatches(fn: Callable[[Batch], PyTree], batches: Batch) -> PyTree:
    """Adds `fn(microbatch)` over the leading axis, in order; a single microbatch needs no loop."""
    first = jax.tree.map(lambda x: x[0], batches)
    if batches.sequence_index.shape[0] == 1:
        return fn(first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(fn, first))
    return jax.lax.scan(lambda t, b: (jax.tree.map(jnp.add, t, fn(b)), None), zeros, batches)[0]


def split_microbatches(batch: Batch, parts: int) -> Batch:
    """Reshapes [B, ...] to [parts, B / parts, ...], with sequence i in part i mod `parts`.

    So each part has sequences of every device, and none moves to another device.
    """
    return jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0), batch
    )
