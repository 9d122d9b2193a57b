"""Layers with their own arrays train as stacked ones do."""

import dataclasses
from functools import partial

import chex
import jax
import numpy as np

import dials_jax as dj
from dials_jax import trees
from dials_jax.config import (
    ArithmeticData,
    ObjectiveConfig,
    OptimizerConfig,
    RouterConfig,
    TrainConfig,
)
from dials_jax.keys import seed_key
from dials_jax.models import families, transformer
from dials_jax.models.folders import save_model
from dials_jax.training.loop import train

CONFIG = TrainConfig(
    model=families.mdlm_small(
        2, 32, 19, mask_id=18, eos_id=1, pad_id=0, max_length=32, dtype="float32"
    ),
    data=ArithmeticData(num_items=100),
    optimizer=OptimizerConfig(learning_rate=1e-2, num_steps=6, warmup_steps=2, ema=0.9),
    objective=ObjectiveConfig(kind="mdlm"),
    batch_size=8,
    save_every=3,
)


def test_unrolled_training_equals_stacked_and_goes_on_from_its_checkpoints(tmp_path):
    stacked = train(CONFIG, tmp_path / "stacked")
    cfg = dataclasses.replace(CONFIG, layout="unrolled")
    state = train(cfg, tmp_path / "unrolled")
    assert trees.is_unrolled(state.params["layers"])
    for name, x in trees.named_leaves(stacked.params | {"layers": {}}):
        np.testing.assert_allclose(x, dict(trees.named_leaves(state.params))[name], atol=2e-4)
    models = [dj.load(tmp_path / name, layout="stacked") for name in ("stacked", "unrolled")]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), *(m.params for m in models)
    )
    again = train(cfg, tmp_path / "unrolled")
    chex.assert_trees_all_equal(state.result, again.result)


def test_routers_learn_alike_on_an_unrolled_backbone(tmp_path):
    cfg = dataclasses.replace(CONFIG.model, num_layers=3)
    params = jax.jit(lambda: transformer.init(cfg, seed_key(0)))()
    save_model(tmp_path / "model", cfg, params)
    routers = TrainConfig(
        backbone=str(tmp_path / "model"),
        router=RouterConfig(d_hidden=8),
        data=CONFIG.data,
        optimizer=OptimizerConfig(learning_rate=1e-2, num_steps=2, warmup_steps=1),
        batch_size=8,
    )
    stacked, unrolled = (
        train(dataclasses.replace(routers, layout=layout), tmp_path / layout).params
        for layout in ("stacked", "unrolled")
    )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), stacked, unrolled)
