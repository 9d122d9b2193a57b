"""One training step, and what a whole run does and does not touch."""

import dataclasses
import hashlib
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dials_jax import sharding, trees
from dials_jax.config import (
    ArithmeticData,
    MeshConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RouterConfig,
)
from dials_jax.data.arithmetic import ArithmeticTask
from dials_jax.data.batches import Batch, batch_at
from dials_jax.errors import InputError
from dials_jax.loading import load
from dials_jax.skipping.routed import init_routers
from dials_jax.training import loop
from dials_jax.training.losses import Draws, Mean, model_loss, router_loss
from dials_jax.training.optimizer import make_optimizer
from dials_jax.training.step import TrainState, init_train_state, make_train_step
from tests.conftest import jitted_init_routers

ROUTER = RouterConfig(d_hidden=8)


@pytest.fixture(scope="module")
def backbone(arithmetic_model):
    return load(arithmetic_model, mesh=sharding.make_mesh(MeshConfig()), layout="stacked")


@pytest.fixture(scope="module")
def batch(arithmetic_data):
    return batch_at(arithmetic_data, seed=0, step=0, batch_size=8)


@pytest.fixture(scope="module")
def arithmetic_data():
    return ArithmeticTask(ArithmeticData(num_items=100)).training_rows


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    chex.assert_trees_all_equal(a, b)


@pytest.mark.parametrize("kind", ["llada", "mdlm", "dropout", "routers"])
def test_one_microbatch_equals_four(kind, backbone, routers, batch):
    """Plain gradient descent at rate 1: the change of a parameter is its gradient."""
    cfg, optimizer = backbone.config, optax.sgd(1.0)
    if kind != "routers":
        params, frozen = backbone.params, {}
        dropped, kind = (0.2, "mdlm") if kind == "dropout" else (0.0, kind)
        loss_fn = model_loss(cfg, ObjectiveConfig(kind=kind), False, dropped)
    else:
        params, frozen = routers, backbone.params
        loss_fn = router_loss(cfg, ROUTER, ObjectiveConfig(), remat=False)
    state = TrainState(jnp.int32(3), params, optimizer.init(params), jnp.int32(-1))
    one, four = (
        jax.jit(make_train_step(loss_fn, optimizer, 0, parts))(state, frozen, batch)
        for parts in (1, 4)
    )
    assert not np.array_equal(*(jax.tree.leaves(s.params)[0] for s in (one[0], state)))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(four), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["dropout", "routers"])
def test_microbatches_do_not_matter_where_jax_makes_other_keys(kind, backbone, routers, batch):
    with jax.default_prng_impl("rbg"):
        test_one_microbatch_equals_four(kind, backbone, routers, batch)


def test_a_step_has_randomness_of_its_own(backbone, batch):
    cfg, optimizer = backbone.config, optax.sgd(0.0)
    step = jax.jit(make_train_step(model_loss(cfg, ObjectiveConfig(), False), optimizer, 0))
    state = TrainState(jnp.int32(0), backbone.params, optimizer.init({}), jnp.int32(-1))
    state, first = step(state, {}, batch)
    _, second = step(state, {}, batch)
    assert state.step == 1
    assert first["masked_share"] != second["masked_share"]


def test_only_routers_have_optimiser_state(backbone):
    cfg = backbone.config
    optimizer = make_optimizer(OptimizerConfig(num_steps=9, warmup_steps=0), 1)
    state = init_train_state(
        lambda: init_routers(cfg.d_model, cfg.num_layers, ROUTER, jax.random.key(0)),
        optimizer,
        sharding.make_mesh(),
        "routers/",
    )
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert len(moments) == 2 * len(jax.tree.leaves(state.params))
    assert sum(x.size for x in moments) == 2 * trees.count_parameters(state.params)


def test_a_skipped_layer_passes_gradient_to_its_router(backbone, batch):
    cfg = backbone.config
    router = RouterConfig(d_hidden=8, execute_bias=-2.0)  # nearly every token votes to skip
    routers = jitted_init_routers(cfg.d_model, cfg.num_layers, router, jax.random.key(0))
    objective = ObjectiveConfig(skip_weight=0.0)  # the skip loss would reach routers by itself
    loss_fn = router_loss(cfg, router, objective, remat=False)
    batch = jax.tree.map(jnp.asarray, batch)
    draws = Draws.of(jax.random.key(0), batch.sequence_index, len(batch.sequence_index))
    gradient = jax.jit(jax.grad(loss_fn, has_aux=True))
    grads, metrics = gradient(routers, backbone.params, batch, draws)
    assert metrics["skip_rate"].value == 1
    assert np.all(np.any(grads["vote_bias"] != 0, axis=-1))  # in every layer


def test_the_moving_average_follows_the_parameters_with_the_published_ramp():
    def loss_fn(params, frozen, batch, draws):
        loss = jnp.sum(params["norm"]["scale"])  # gradient 1, rate 1: it falls by 1 a step
        return loss, {"loss": Mean.of(loss[None])}

    optimizer, ema = optax.sgd(1.0), 0.3
    start = {"norm": {"scale": jnp.full(1, 10.0)}}
    state = init_train_state(lambda: start, optimizer, sharding.make_mesh(), ema=ema)
    step = jax.jit(make_train_step(loss_fn, optimizer, seed=0, ema=ema))
    rows = np.zeros((1, 2), np.int32), np.ones((1, 2), bool), None, np.arange(1, dtype=np.int32)
    average, decays = 10.0, []
    for n in range(1, 6):
        state, _ = step(state, {}, Batch(*rows))
        decays.append(min(ema, (1 + n) / (10 + n)))
        average = decays[-1] * average + (1 - decays[-1]) * (10.0 - n)
        np.testing.assert_allclose(state.average["norm"]["scale"], [average], rtol=1e-6)
        np.testing.assert_allclose(state.params["norm"]["scale"], [10.0 - n])
    assert decays[0] == 2 / 11 and decays[-1] == ema  # the ramp, and its end
    assert state.result is state.average


# ------------------------------------------------------------------------------ non-finite values


def test_a_non_finite_gradient_freezes_the_last_good_state():
    def loss_fn(params, frozen, batch, draws):
        loss = jnp.sum(params["w"] * frozen["x"])
        return loss, {"loss": Mean.of(loss[None])}

    optimizer = optax.adam(0.1)
    params = {"w": jnp.array([1.0, 2.0])}
    state = TrainState(jnp.int32(0), params, optimizer.init(params), jnp.int32(-1), params)
    rows = np.zeros((2, 4), np.int32), np.ones((2, 4), bool), None, np.arange(2, dtype=np.int32)
    step = jax.jit(make_train_step(loss_fn, optimizer, seed=0, ema=0.9))
    for _ in range(2):
        state, _ = step(state, {"x": jnp.array([1.0, -1.0])}, Batch(*rows))
    good = jax.device_get(state)
    assert (good.step, good.bad_step) == (2, -1)
    for x in (jnp.array([jnp.nan, 1.0]), jnp.array([jnp.inf, 1.0]), jnp.ones(2)):
        state, _ = step(state, {"x": x}, Batch(*rows))
        assert_equal(state, good._replace(bad_step=np.int32(2)))


def test_training_stops_at_a_non_finite_loss_and_keeps_its_checkpoints(train_config, tmp_path):
    optimizer = OptimizerConfig(learning_rate=1e37, num_steps=6, warmup_steps=1)
    cfg = train_config(optimizer=optimizer, save_every=1, log_every=1)
    # Step 0 still has rate 0 and step 1 makes the weights huge, so step 2 is the first bad one.
    with pytest.raises(loop.NonFiniteLoss, match="not finite at step 2"):
        loop.train(cfg, tmp_path)
    saved = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert saved == ["00000001", "00000002"]
    assert not (tmp_path / "model").exists()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


# -------------------------------------------------------------------------------- whole runs


def files_digest(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_router_training_leaves_the_backbone_bitwise_alone(
    train_config, arithmetic_model, tmp_path, monkeypatch
):
    seen = []

    def prepare_run(cfg, mesh):
        run = original(cfg, mesh)
        seen.append((jax.device_get(run.frozen), run.frozen))
        return run

    original = loop.prepare_run
    monkeypatch.setattr(loop, "prepare_run", prepare_run)
    on_disk = files_digest(arithmetic_model)
    state = loop.train(train_config(arithmetic_model), tmp_path)
    [(before, after)] = seen
    assert_equal(before, jax.device_get(after))
    assert files_digest(arithmetic_model) == on_disk
    assert np.any(state.params["vote"])  # which starts at zero


@pytest.mark.parametrize("kind", ["model", "routers"])
def test_all_steps_are_one_program(kind, train_config, arithmetic_model, tmp_path, monkeypatch):
    """The first, those of later epochs, and those after a save."""

    def make_once(*args):
        return chex.assert_max_traces(make_train_step(*args), n=1)

    chex.clear_trace_counter()
    monkeypatch.setattr(loop, "make_train_step", make_once)
    data = ArithmeticData(num_items=20)  # two steps an epoch
    backbone = arithmetic_model if kind == "routers" else ""
    loop.train(train_config(backbone, data=data, save_every=2), tmp_path)
    assert logged(tmp_path)[-1]["epoch"] == 3


def logged(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["llada", "mdlm", "causal"])
def test_training_lowers_the_loss(kind, train_config, tmp_path):
    optimizer = OptimizerConfig(learning_rate=1e-2, num_steps=60, warmup_steps=5)
    model = dataclasses.replace(train_config().model, causal=kind == "causal")
    cfg = train_config(
        model=model, objective=ObjectiveConfig(kind=kind), optimizer=optimizer, batch_size=32,
        save_every=60, log_every=10,
    )  # fmt: skip
    loop.train(cfg, tmp_path)
    lines, name = logged(tmp_path), "token_ce" if kind == "causal" else "masked_ce"
    assert lines[-1][name] < 0.8 * lines[0][name]
    assert load(tmp_path).config == cfg.model  # the workdir is a model now


def test_a_line_of_the_log_is_the_mean_over_all_that_its_steps_have_seen(train_config, tmp_path):
    """Over masked tokens, not over steps, of which one has few and another many."""
    for every in (1, 3):
        loop.train(train_config(log_every=every, batch_size=2), tmp_path / str(every))
    steps, windows = logged(tmp_path / "1"), logged(tmp_path / "3")
    assert [line["step"] for line in windows] == [3, 6]
    shares, nats, losses, norms = (
        np.array([line[name] for line in steps]).reshape(2, 3)
        for name in ("masked_share", "masked_ce", "loss", "grad_norm")
    )
    by_token = (shares * nats).sum(axis=1) / shares.sum(axis=1)
    assert np.abs(by_token - nats.mean(axis=1)).max() > 1e-4
    np.testing.assert_allclose([line["masked_ce"] for line in windows], by_token, rtol=1e-6)
    for name, values in (("loss", losses), ("grad_norm", norms), ("masked_share", shares)):
        np.testing.assert_allclose([line[name] for line in windows], values.mean(1), rtol=1e-6)
    rates = ["tokens_per_second" in line for line in steps]
    assert rates == [False, True, True, True, True, True]


def test_the_model_that_comes_out_is_the_moving_average(train_config, tmp_path):
    optimizer = OptimizerConfig(learning_rate=1e-2, num_steps=4, warmup_steps=1, ema=0.9)
    state = loop.train(train_config(optimizer=optimizer), tmp_path)
    assert_equal(jax.device_get(load(tmp_path, layout="stacked").params), state.average)
    assert not np.array_equal(state.average["embed"]["table"], state.params["embed"]["table"])


def test_training_stops_when_its_time_is_over_and_goes_on_from_there(
    train_config, tmp_path, monkeypatch
):
    """After as many steps as the clock allows, each of which it did as the whole run does."""
    whole = loop.train(train_config(log_every=1), tmp_path / "whole")
    minutes = iter([0, 1, 2, 3, 10, 11, 12, 13, 14, 15])
    monkeypatch.setattr(loop.Clock, "now", lambda self: 60.0 * next(minutes))
    cfg = train_config(log_every=5, save_every=100, max_minutes=2.5)  # between two logs
    part = loop.train(cfg, tmp_path / "part")
    assert int(part.step) == 3 and load(tmp_path / "part").config == cfg.model
    assert_equal(loop.train(cfg, tmp_path / "part"), whole)
    assert [line["step"] for line in logged(tmp_path / "part")] == [3, 5, 6]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh": MeshConfig(data=3)}, "does not fit"),
        ({"optimizer": OptimizerConfig(num_steps=3, warmup_steps=3)}, "warm-up"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_written(
    changes, message, train_config, tmp_path
):
    with pytest.raises(InputError, match=message):
        loop.train(train_config(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()
