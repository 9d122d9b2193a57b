"""The compiled programs of a generation, and how models take turns in one.

Under a schedule every model has one program for all the steps that it may take: it gets the state
and the step at which the next model continues. The state stays on the device.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from dials_jax.caching.canvas import CanvasModel
from dials_jax.compiling import timed_jit
from dials_jax.diffusion.guidance import repeat_batch
from dials_jax.models import transformer
from dials_jax.models.model import Model
from dials_jax.nn.policy import Policy
from dials_jax.sampling.model_schedule import Schedule
from dials_jax.sampling.sampler import CallRecord, Steps

STATIC = ("cfg", "sampler", "cache", "executor")

Generated = tuple[
    tuple[Int[Array, "B T"], CallRecord], float
]  # the canvas, its record, and seconds


class Role(NamedTuple):
    """A model that takes some of the steps, and what it leaves out in them."""

    model: Model
    policy: Policy | None


def lay_out_canvas(
    params, prompts, valid, keys, policy, *, cfg, sampler, cache, executor
) -> tuple[Int[Array, "B T"], Steps]:
    """Prompts, then blanks, and the steps of a model on them; three keys from each sequence's one.

    Under guidance the model sees every canvas twice, each time with other random gates.
    """
    answer = jnp.full((len(prompts), sampler.gen_length), sampler.blank_id(cfg), prompts.dtype)
    canvas = jnp.concatenate([prompts, answer], axis=1)
    if valid is not None:
        valid = jnp.concatenate([valid, jnp.ones_like(answer, bool)], axis=1)
    noise_keys, gate_keys, uncond_gate_keys = jax.vmap(lambda k: jax.random.split(k, 3))(keys).T
    length, prompt_mask = prompts.shape[1], None
    if sampler.cfg_scale > 0:
        prompt_mask = jnp.broadcast_to(jnp.arange(canvas.shape[1]) < length, canvas.shape)
        gate_keys = jnp.concatenate([gate_keys, uncond_gate_keys])
        valid = repeat_batch(valid)
    block_inputs = transformer.block_inputs(cfg, valid, (len(gate_keys), canvas.shape[1]))
    never_masked = length if prompt_mask is None else 0
    net = CanvasModel(
        cfg, params, policy, executor, block_inputs, gate_keys, prompt_mask, never_masked
    )
    return canvas, sampler.make_steps(net, length, noise_keys, cache)


@timed_jit(*STATIC)
def generate_program(
    params, prompts, valid, keys, policy, **static
) -> tuple[Int[Array, "B T"], CallRecord]:
    """All steps by one model."""
    canvas, steps = lay_out_canvas(params, prompts, valid, keys, policy, **static)
    state = steps.run(steps.start(canvas, static["cfg"].num_layers))
    return state.tokens, state.record


@timed_jit(*STATIC, "num_layers")
def start_program(params, prompts, valid, keys, *, num_layers, **static) -> PyTree:
    """The state before the first step. Args: num_layers: of the deepest model."""
    canvas, steps = lay_out_canvas(params, prompts, valid, keys, None, **static)
    return steps.start(canvas, num_layers)


@timed_jit(*STATIC)
def segment_program(params, state, stop, prompts, valid, keys, policy, **static) -> PyTree:
    """The steps of one model up to number `stop`."""
    _, steps = lay_out_canvas(params, prompts, valid, keys, policy, **static)
    return steps.run(state, stop)


def run_alone(role: Role, batch: tuple, **static) -> Generated:
    """Runs one model's steps as one program. Args: batch: prompts, valid and keys, placed."""
    return role.model.run(generate_program, *batch, role.policy, **static)


def run_schedule(roles: dict[str, Role], schedule: Schedule, batch: tuple, **static) -> Generated:
    """Runs the models of a schedule in turns.

    Args:
      batch: prompts, valid and keys, placed on the models' mesh.
    """
    acting = {letter: roles[letter] for letter in schedule.letters}
    num_layers = max(role.model.num_layers for role in acting.values())
    first = acting[schedule.letters[0]].model
    state, seconds = first.run(start_program, *batch, **static, num_layers=num_layers)
    placement = jax.tree.map(lambda x: x.sharding, state)
    programs = {}
    for letter, (model, policy) in acting.items():
        with jax.set_mesh(model.mesh):
            programs[letter] = segment_program.program(
                model.inference_params, state, np.int32(0), *batch, policy,
                cfg=model.config, **static,
            )  # fmt: skip
    jax.block_until_ready([(role.model.inference_params, role.policy) for role in acting.values()])
    start = time.perf_counter()
    for letter, stop in schedule.ends():
        model, policy = acting[letter]
        state = programs[letter](model.inference_params, state, np.int32(stop), *batch, policy)
        state = jax.device_put(state, placement)  # nothing moves unless a compiler chose otherwise
    jax.block_until_ready(state)
    return (state.tokens, state.record), seconds + time.perf_counter() - start
