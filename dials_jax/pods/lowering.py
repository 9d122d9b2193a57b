"""The programs of training, generation and scoring, for devices that are not here.

What is lowered is what runs: the loop's own step, and the programs of `generate` and `score_pairs`
(over a cache `generate` may divide its program). Arrays have a shape and a sharding only; no
weights and no data are read.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from dials_jax import sharding, trees
from dials_jax.caching.cache import Cache
from dials_jax.caching.plain import NoCache
from dials_jax.config import EightBits, Layout, ModelConfig, RouterConfig, TrainConfig
from dials_jax.data.batches import Batch
from dials_jax.data.sources import may_pad_rows
from dials_jax.evaluation.likelihood import score_pairs_program
from dials_jax.evaluation.pairs import Pairs
from dials_jax.keys import seed_key, threefry_key
from dials_jax.models import transformer
from dials_jax.models.folders import stored_shapes
from dials_jax.models.groups import chosen_layout
from dials_jax.nn import fusing
from dials_jax.nn.modules import Form
from dials_jax.nn.policy import Policy
from dials_jax.sampling.generate import generate_program, segment_program, start_program
from dials_jax.sampling.refill import Arrivals, block_program, empty_ring_program
from dials_jax.sampling.sampler import Sampler
from dials_jax.skipping.routed import Routed, init_routers, rounded
from dials_jax.training.optimizer import make_optimizer
from dials_jax.training.run import make_trainee, unroll
from dials_jax.training.step import jit_train_step, make_train_step, state_shapes


def lower_train_step(
    cfg: TrainConfig,
    mesh: Mesh,
    length: int,
    backbone: ModelConfig | None = None,
    dtype: str | None = None,
) -> jax.stages.Lowered:
    """The training loop's own step.

    Args:
      length: tokens of a row.
      backbone: the frozen model, where routers are trained.
      dtype: of its weights; None: that of its activations.
    """
    optimizer, ema = make_optimizer(cfg.optimizer, 1), cfg.optimizer.ema
    trainee, frozen = make_trainee(cfg, backbone), {}
    if backbone is not None:
        key = seed_key(cfg.seed)
        dtype = dtype or backbone.dtype
        frozen = jax.eval_shape(lambda: trees.cast(transformer.init(backbone, key), dtype))
        frozen = jax.eval_shape(unroll, frozen) if cfg.layout == "unrolled" else frozen
        frozen = _placed(frozen, sharding.param_shardings(frozen, mesh))
    state = state_shapes(trainee.init, optimizer, mesh, trainee.prefix, ema=ema)
    step = make_train_step(trainee.loss_fn, optimizer, cfg.seed, cfg.num_microbatches, ema)
    row = partial(_rows, mesh, cfg.batch_size)
    valid = row(bool, length) if may_pad_rows(cfg.data) else None
    batch = Batch(row(jnp.int32, length), row(bool, length), valid, row(jnp.int32))
    with jax.set_mesh(mesh):
        return jit_train_step(step, state, mesh, trainee.prefix).lower(state, frozen, batch)


def lower_generation(
    cfg: ModelConfig,
    params: PyTree,
    mesh: Mesh,
    sampler: Sampler,
    shape: tuple[int, int],
    cache: Cache | None = None,
    policy: Policy | None = None,
    padded: bool = True,
) -> jax.stages.Lowered:
    """The program of `generate`; of a sampler with several, the one that takes the steps.

    Steps that are known beforehand run over a cache as several programs, each a part of this one
    (`sampling.timetable`): together they compute and send the same, and none takes more memory.

    Args:
      params: of `inference_shapes`.
      shape: number of sequences, and tokens per prompt.
      padded: some prompts are shorter, and padded on the left.
    """
    rows = partial(_rows, mesh, shape[0])
    valid = rows(bool, shape[1]) if padded else None
    batch = (rows(jnp.int32, shape[1]), valid, _keys(mesh, shape[0]))
    static = _static(cfg, sampler, cache) | {"log_probs": False, "trajectory": False}
    # The abstract mesh: constants are computed on this machine, not on chips that do not exist.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        if sampler.one_program:
            return generate_program.lower(params, *batch, policy, **static)
        start = start_program.lower(params, *batch, num_layers=cfg.num_layers, **static)
        state = _placed(start.out_info, start.compile().output_shardings)
        static["placement"] = sharding.placement_of(state)
        return segment_program.lower(params, state, np.int32(0), *batch, policy, **static)


def _static(cfg: ModelConfig, sampler: Sampler, cache: Cache | None) -> dict[str, Any]:
    return {"cfg": cfg, "sampler": sampler, "cache": cache or NoCache(), "executor": "auto"}


def lower_block(
    cfg: ModelConfig,
    params: PyTree,
    mesh: Mesh,
    sampler: Sampler,
    shape: tuple[int, int],
    cache: Cache | None = None,
    policy: Policy | None = None,
) -> jax.stages.Lowered:
    """The program of `generate_refilled`, which fills one block. Args: as `lower_generation`.

    The state between two blocks lies as the program puts it that makes the first one.
    """
    batch, length = shape[0], -(-shape[1] // sampler.block_length) * sampler.block_length
    rows = partial(_rows, mesh, batch)
    arrivals = Arrivals(rows(bool), rows(jnp.int32, length), rows(bool, length), _keys(mesh, batch))
    static = _static(cfg, sampler, cache)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        empty = empty_ring_program.lower(params, arrivals, **static, log_probs=False)
        ring = _placed(empty.out_info, empty.compile().output_shardings)
        static["placement"] = sharding.placement_of(ring)
        return block_program.lower(params, arrivals, policy, ring=ring, **static)


def lower_scoring(
    cfg: ModelConfig,
    params: PyTree,
    mesh: Mesh,
    shape: tuple[int, int, int],
    *,
    stratum: int,
    cfg_scale: float = 0.0,
    policy: Policy | None = None,
) -> jax.stages.Lowered:
    """The program of `score_pairs`.

    Args:
      params: of `inference_shapes`.
      shape: number of copies, tokens of prompt and answer, and those of an answer.
    """
    batch, length, answer = shape
    rows = partial(_rows, mesh, batch)
    pairs = Pairs(rows(jnp.int32, length), rows(bool, length), rows(bool, answer))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return score_pairs_program.lower(
            params, pairs, _keys(mesh, batch), rows(jnp.int32), policy, cfg=cfg, stratum=stratum,
            cfg_scale=cfg_scale, executor="auto",
        )  # fmt: skip


def inference_shapes(
    cfg: ModelConfig,
    mesh: Mesh,
    layout: Layout = "auto",
    weights: EightBits | None = None,
    dtype: str | None = None,
) -> PyTree:
    """The parameters that compiled functions get, as `Model.inference_params`: shapes, placed.

    Args:
      layout: of the layers; "auto": see `groups.chosen_layout`.
      weights: in 8 bits.
      dtype: of the weights; None: that of activations.
    """
    groups = stored_shapes(cfg, dtype or cfg.dtype, weights)
    layout, parts = chosen_layout(layout, mesh, cfg), mesh.shape["tensor"]
    layers = tuple(groups.pop(f"layers/{i:03d}") for i in range(cfg.num_layers))
    params = dict(groups)
    if layout == "fused":
        params["form"] = Form(fused=parts)
        layers = tuple(jax.eval_shape(partial(fusing.fuse, parts=parts), x) for x in layers)
    if layout == "stacked":
        layers = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((cfg.num_layers, *x.shape), x.dtype), layers[0]
        )
    prepare = partial(transformer.prepare_for_inference, cfg)
    params = jax.eval_shape(prepare, {**params, "layers": layers})
    return _placed(params, sharding.param_shardings(params, mesh))


def routed_shapes(
    cfg: ModelConfig, router: RouterConfig, mesh: Mesh, threshold: Any, unrolled: bool = False
) -> Routed:
    """Routers of a model as a policy: shapes, whole on every device."""

    def make():
        routers = init_routers(cfg.d_model, cfg.num_layers, router, seed_key(0))
        return rounded(routers, cfg.dtype)

    shapes, whole = jax.eval_shape(make), sharding.replicated(mesh)
    if unrolled:
        shapes = jax.eval_shape(trees.unstack, shapes)
    return Routed(_placed(shapes, jax.tree.map(lambda _: whole, shapes)), threshold, router.votes)


def _placed(shapes: PyTree, places: PyTree) -> PyTree:
    """Abstract arrays with their shardings."""
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places
    )


def _rows(mesh: Mesh, batch: int, dtype: Any, *rest: int) -> jax.ShapeDtypeStruct:
    """Abstract sequences, split over the mesh."""
    place = sharding.batch_sharding(mesh)
    return jax.ShapeDtypeStruct((batch, *rest), np.dtype(dtype), sharding=place)


def _keys(mesh: Mesh, batch: int) -> jax.ShapeDtypeStruct:
    """Abstract random keys, one per sequence."""
    dtype = jax.eval_shape(lambda: threefry_key(seed_key(0))).dtype
    return jax.ShapeDtypeStruct((batch,), dtype, sharding=sharding.batch_sharding(mesh))
