"""The compiled programs of a generation, and how models take turns in one.

Under a schedule every model has one program, whichever steps it takes: it is given the state and
the step at which the next model goes on. The state stays on the device.
"""

from __future__ import annotations

import time
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from dials_jax.caching.cache import Cache
from dials_jax.caching.canvas import CanvasModel
from dials_jax.compiling import Timed
from dials_jax.models import transformer
from dials_jax.models.model import Model
from dials_jax.nn.policy import Policy
from dials_jax.sampling.ancestral import Ancestral, Exact
from dials_jax.sampling.autoregressive import Autoregressive, filler
from dials_jax.sampling.loop import CallRecord, Loop, Sampler, num_steps
from dials_jax.sampling.model_schedule import Schedule
from dials_jax.sampling.published import Published

AnySampler = Sampler | Ancestral | Autoregressive


class Role(NamedTuple):
    """A model that takes some of the steps, and what it leaves out in them."""

    model: Model
    policy: Policy | None


@runtime_checkable
class Steps(Protocol):
    """How a sampler fills a canvas, as functions from state to state."""

    def start(self, canvas: Int[Array, "B T"], num_layers: int) -> PyTree:
        """The state before the first step; it has `tokens` and `record`."""

    def run(self, state: PyTree, stop: Int[Array, ""] | None = None) -> PyTree:
        """The state before step `stop`; None: after all."""


class Setting(NamedTuple):
    """What a program works on: the batch as this model and sampler see it."""

    net: CanvasModel
    canvas: Int[Array, "B T"]
    noise_keys: jax.Array
    prompt_length: int


def set_out(params, prompts, valid, keys, policy, *, cfg, sampler, executor) -> Setting:
    """Prompts, then blanks; three keys from each row's one."""
    blank = filler(cfg) if isinstance(sampler, Autoregressive) else cfg.mask_id
    answer = jnp.full((prompts.shape[0], sampler.gen_length), blank, prompts.dtype)
    canvas = jnp.concatenate([prompts, answer], axis=1)
    if valid is not None:
        valid = jnp.concatenate([valid, jnp.ones_like(answer, bool)], axis=1)
    noise_keys, gate_keys, uncond_gate_keys = jax.vmap(lambda k: jax.random.split(k, 3))(keys).T
    given, prompt_length = None, prompts.shape[1]
    if sampler.cfg_scale > 0:
        given = jnp.broadcast_to(jnp.arange(canvas.shape[1]) < prompt_length, canvas.shape)
        gate_keys = jnp.concatenate([gate_keys, uncond_gate_keys])
        valid = None if valid is None else jnp.concatenate([valid, valid])
    rows = transformer.block_inputs(cfg, valid, (gate_keys.shape[0], canvas.shape[1]))
    unseen = prompt_length if given is None else 0
    net = CanvasModel(cfg, params, policy, executor, rows, gate_keys, given, unseen)
    return Setting(net, canvas, noise_keys, prompt_length)


def steps_of(sampler: Sampler | Ancestral, cache: Cache, setting: Setting) -> Steps:
    net, _, keys, prompt_length = setting
    if isinstance(sampler, Ancestral):
        kind = Exact if sampler.precision == "exact" else Published
        return kind(sampler, net, prompt_length, keys)
    return Loop(sampler, cache, net, prompt_length, keys)


def count_steps(sampler: AnySampler, cache: Cache) -> int:
    """The steps that a schedule divides among models."""
    if isinstance(sampler, Autoregressive):
        return sampler.max_new_tokens
    return sampler.steps if isinstance(sampler, Ancestral) else num_steps(sampler, cache)


def _begin_fn(params, prompts, valid, keys, *, cfg, sampler, cache, executor, num_layers) -> PyTree:
    setting = set_out(
        params, prompts, valid, keys, None, cfg=cfg, sampler=sampler, executor=executor
    )
    return steps_of(sampler, cache, setting).start(setting.canvas, num_layers)


def _segment_fn(
    params, state, stop, prompts, valid, keys, policy, *, cfg, sampler, cache, executor
) -> PyTree:
    setting = set_out(
        params, prompts, valid, keys, policy, cfg=cfg, sampler=sampler, executor=executor
    )
    return steps_of(sampler, cache, setting).run(state, stop)


STATIC = ("cfg", "sampler", "cache", "executor")
_begin = Timed(_begin_fn, static_argnames=(*STATIC, "num_layers"))
_segment = Timed(_segment_fn, static_argnames=STATIC)


def take_turns(
    roles: dict[str, Role], schedule: Schedule, rows: tuple, **static
) -> tuple[tuple[Int[Array, "B T"], CallRecord], float]:
    """Runs a schedule: the canvas and its record, and the seconds that it took.

    Args:
      rows: prompts, valid and keys, placed on the models' mesh.
    """
    acting = {letter: roles[letter] for letter in schedule.letters}
    num_layers = max(role.model.num_layers for role in acting.values())
    first = acting[schedule.letters[0]].model
    state, seconds = first.run(_begin, *rows, **static, num_layers=num_layers)
    placement = jax.tree.map(lambda x: x.sharding, state)
    programs = {}
    for letter, (model, policy) in acting.items():
        with jax.set_mesh(model.mesh):
            programs[letter] = _segment.program(
                model.inference_params,
                state,
                np.int32(0),
                *rows,
                policy,
                cfg=model.config,
                **static,
            )
    jax.block_until_ready([(role.model.inference_params, role.policy) for role in acting.values()])
    start = time.perf_counter()
    for letter, stop in schedule.ends():
        model, policy = acting[letter]
        state = programs[letter](model.inference_params, state, np.int32(stop), *rows, policy)
        state = jax.device_put(state, placement)  # nothing moves unless a compiler chose otherwise
    jax.block_until_ready(state)
    return (state.tokens, state.record), seconds + time.perf_counter() - start
