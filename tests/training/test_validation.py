"""Held-out data in training: what is logged, and that it changes nothing else."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dials_jax.config import ArithmeticData, ObjectiveConfig, RouterConfig, TextData
from dials_jax.data.sources import load_training_data
from dials_jax.errors import InputError
from dials_jax.loading import load
from dials_jax.skipping.routed import Routed
from dials_jax.skipping.storage import load_router, router_facts
from dials_jax.training import loop
from dials_jax.training.checkpoint import Checkpoints
from dials_jax.training.loop import train
from dials_jax.training.losses import Draws, model_loss, routed_metrics, router_loss
from dials_jax.training.step import TrainState
from dials_jax.training.validation import (
    Validation,
    held_out_batch,
    held_out_key,
    model_score,
    summarise_validation,
)

DATA = ArithmeticData(num_items=200)
CHECKED = {
    "validation": DATA,
    "validate_every": 4,
    "validation_batches": 2,
    "validation_thresholds": (0.3, 0.6),
}


def logged(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k != "tokens_per_second"} for line in lines
    ]


@pytest.fixture(scope="module")
def config(arithmetic_model):
    """Makes the configuration of a short training of routers that skip some layers."""
    from dials_jax.config import OptimizerConfig, TrainConfig

    def make(**changes):
        values = {
            "backbone": str(arithmetic_model),
            "router": RouterConfig(d_hidden=8, skip_threshold=0.4, execute_bias=0.1),
            "data": DATA,
            "optimizer": OptimizerConfig(learning_rate=1e-2, num_steps=6, warmup_steps=1),
            "batch_size": 8, "log_every": 3, "save_every": 6,
        }  # fmt: skip
        return TrainConfig(**(values | CHECKED | changes))

    return make


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("validated")
    state = train(config(fit_execution=(0.6,)), workdir)
    return workdir, state


def test_validation_is_logged_on_its_steps_and_after_the_last(run):
    records = logged(run[0])
    assert [record["step"] for record in records] == [3, 4, 6]
    names = {"loss", "execution", "execution_sampled", "masked_ce"}
    names |= {f"{name}@{tau}" for name in ("execution", "masked_ce") for tau in (0.3, 0.6)}
    for record in records:
        found = {n.partition("/")[2] for n in record if n.startswith("validation/")}
        assert found == (set() if record["step"] == 3 else names)


def test_validation_changes_nothing_else(run, config, tmp_path):
    state = train(config(validation=None, validation_thresholds=()), tmp_path)
    chex.assert_trees_all_equal(state, run[1])
    plain, validated = logged(tmp_path)[-1], logged(run[0])[-1]
    assert plain["loss"] != 0 and plain["skip_rate"] > 0
    assert plain.keys() < validated.keys()


def test_what_is_logged_is_what_inference_runs(run, config, arithmetic_model):
    """By the losses, and by the model's own forward pass of the exported router."""
    cfg, model = config(), load(arithmetic_model)
    rows, _ = load_training_data(DATA, model.config, held_out=True)
    policy = load_router(run[0], model)
    total, sampled, runs = 0.0, 0.0, 0
    metrics = jax.jit(routed_metrics(model.config, cfg.objective))
    loss = jax.jit(router_loss(model.config, cfg.router, cfg.objective, False))
    for number in range(2):
        batch = held_out_batch(rows, number, 8, model.mesh)
        draws = Draws.of(held_out_key(number), batch.sequence_index, 8, 6)
        found = metrics(policy, model.params, batch, draws)
        total += float(found["execution"].total)
        _, of_training = loss(run[1].params, model.params, batch, draws)
        sampled += float(of_training["skip_rate"].total)
        runs += float(found["execution"].count)
    last = logged(run[0])[-1]
    assert last["validation/execution"] == pytest.approx(total / runs, rel=1e-6)
    assert last["validation/execution_sampled"] == pytest.approx(1 - sampled / runs)
    assert last["validation/execution@0.3"] <= last["validation/execution"]
    assert last["validation/execution@0.6"] >= last["validation/execution"]
    assert 0 < last["validation/execution_sampled"] < 1


def test_a_continued_run_logs_the_same(run, config, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    save = Checkpoints.save

    def saves_once(self, step, *state):
        save(self, step, *state)
        raise Killed

    cfg = config(save_every=2)
    monkeypatch.setattr(Checkpoints, "save", saves_once)
    for _ in range(2):
        with pytest.raises(Killed):
            train(cfg, tmp_path)
    monkeypatch.undo()
    state = train(cfg, tmp_path)
    chex.assert_trees_all_equal(state, run[1])
    validated = [r for r in logged(tmp_path) if "validation/loss" in r]
    assert [r["step"] for r in validated] == [4, 6]
    for ours, theirs in zip(validated, logged(run[0])[1:], strict=True):
        assert {k: v for k, v in ours.items() if "/" in k} == {
            k: v for k, v in theirs.items() if "/" in k
        }


def test_validation_may_change_when_a_run_goes_on(run, config):
    train(config(validate_every=1, validation_batches=1, validation_thresholds=()), run[0])
    assert router_facts(run[0])[1].fitted == ()  # nothing is fitted now


def test_thresholds_are_fitted_after_the_last_step(config, tmp_path, capsys):
    cfg = config(fit_execution=(0.7,), router=RouterConfig(d_hidden=8, votes="soft"))
    train(cfg, tmp_path)
    (fitted,) = router_facts(tmp_path)[1].fitted
    assert fitted.execution_ratio == 0.7 and fitted.votes == "soft"
    out = capsys.readouterr().out
    assert "of the layers run at inference (tau=0.1, soft votes)" in out
    assert "at tau=0.3" in out


def test_held_out_items_are_in_no_training_and_in_no_test():
    from dials_jax.data.arithmetic import ArithmeticTask

    task = ArithmeticTask(DATA)
    rows = task.held_out_rows.pairs
    held_out = {task.tokenizer.decode(list(prompt)) for prompt, _ in rows}
    assert len(held_out) == len(rows) > 500
    assert not held_out & {record["prompt"] for record in task.test_records()}
    assert not held_out & {record["prompt"] for record in task.records(held_out=False)}


def test_the_rows_of_training_are_no_validation(train_config, arithmetic_model, tmp_path):
    (tmp_path / "digits.txt").write_text("0123456789" * 20)
    text = TextData(
        paths=(str(tmp_path / "digits.txt"),), cache=str(tmp_path), length=8,
        tokenizer=str(arithmetic_model),
    )  # fmt: skip
    with pytest.raises(InputError, match="validation= has the rows of data=; give held-out ones"):
        train(train_config(data=text, validation=text), tmp_path / "run")


def test_a_model_is_validated_by_its_own_loss(train_config, tmp_path, capsys):
    cfg = train_config(validation=DATA, validate_every=4, validation_batches=1, dropout=0.1)
    train(cfg, tmp_path)
    found = [r for r in logged(tmp_path) if "validation/loss" in r]
    assert [r["step"] for r in found] == [4, 6]
    assert found[1]["validation/masked_ce"] < 3.2
    assert f"loss {found[1]['validation/loss']:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize(("num_rows", "microbatches"), [(11, 2), (3, 1), (8, 1)])
def test_every_held_out_row_is_scored_once(num_rows, microbatches, train_config, arithmetic_model):
    """Also those of a last batch that is not full, with the mask ratios spread over them."""
    model, objective = load(arithmetic_model, layout="stacked"), ObjectiveConfig(kind="mdlm")
    rows, _ = load_training_data(DATA, model.config, held_out=True)
    rows = dataclasses.replace(rows, pairs=rows.pairs[:num_rows])
    cfg = train_config(batch_size=4, num_microbatches=microbatches, validation=DATA)
    loss, seen, total, nats, masked = model_loss(model.config, objective, False), [], 0, 0, 0
    for number in range(-(-num_rows // 4)):
        batch = jax.device_get(held_out_batch(rows, number, 4, model.mesh))
        here = np.flatnonzero(batch.answer.any(axis=1))
        batch = jax.tree.map(lambda x, here=here: jnp.asarray(x[here]), batch)
        seen += map(tuple, batch.tokens.tolist())
        draws = Draws.of(held_out_key(number), batch.sequence_index, len(batch.tokens))
        _, found = loss(model.params, {}, batch, draws)
        total, nats = total + found["loss"].total, nats + found["masked_ce"].total
        masked += found["masked_ce"].count
    assert sorted(seen) == sorted(map(tuple, rows.rows(range(num_rows))[0].tolist()))
    state = TrainState(jnp.int32(0), model.params, (), jnp.int32(-1))
    found = Validation(model_score(loss), rows, model.mesh, cfg)(state, {})
    assert found["validation/loss"] == pytest.approx(float(total) / num_rows, rel=1e-5)
    assert found["validation/masked_ce"] == pytest.approx(float(nats / masked), rel=1e-5)


def test_a_finished_run_says_nothing_of_a_validation_that_was_not_made(run, config, capsys):
    train(config(), run[0])
    assert "" not in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"validation": None}, r"validation_thresholds=\(0.3, 0.6\) is for routers with valid"),
        ({"validation_thresholds": (0.2, 0.2)}, "must be different numbers in"),
        ({"fit_execution": (1.5,)}, r"fit_execution=\(1.5,\) must be different numbers in"),
        ({"fit_execution": (0.5, 0.0)}, r"fit_execution=\(0.5, 0.0\): a share of 0 runs no layer"),
        ({"validate_every": 0}, "validate_every=0 must be positive"),
    ],
)
def test_settings_of_validation_are_checked(config, changes, problem):
    with pytest.raises(InputError, match=problem):
        config(**changes)


def test_the_summary_warns_of_a_router_that_does_not_skip():
    values = {"execution": 1.0, "execution_sampled": 0.6, "masked_ce": 2.0, "loss": 3.0}
    values = {f"validation/{name}": x for name, x in values.items()}
    line = summarise_validation(values, RouterConfig())
    assert "100.0% of the layers run at inference" in line
    assert "60.0% under the votes of training" in line
    assert "warning: the router never skips: train with a larger lambda" in line
    assert "warning" not in summarise_validation(
        values | {"validation/execution": 0.9}, RouterConfig()
    )


def test_the_bar_shows_both_rates():
    means = {"loss": 1.0, "skip_rate": 0.4, "tokens_per_second": 10.0}
    text = loop._summary(means, {"validation/execution": 0.95})
    assert "skip 40.0%, at inference 5.0%" in text


# ------------------------------------------------------------------------------- annealed noise


def test_noise_without_scale_gives_the_decision_of_inference(arithmetic_model):
    """With the scale at 0 the loss under Gumbel noise has the gates of the policy."""
    model, objective = load(arithmetic_model), ObjectiveConfig(min_mask_ratio=0.2)
    from tests.conftest import random_routers

    router = RouterConfig(d_hidden=8, skip_threshold=0.4, anneal_steps=4)
    routers = random_routers(model.config)
    rows, _ = load_training_data(DATA, model.config, held_out=True)
    batch = held_out_batch(rows, 0, 32, model.mesh)
    loss = router_loss(model.config, router, objective, False)
    metrics = routed_metrics(model.config, objective)

    @jax.jit
    def skipped(step):
        draws = Draws.of(jax.random.key(3), batch.sequence_index, 32, step)
        _, found = loss(routers, model.params, batch, draws)
        policy = Routed(routers, router.skip_threshold)
        return found["skip_rate"].value, metrics(policy, model.params, batch, draws)["execution"]

    rates = [skipped(jnp.int32(step)) for step in (0, 4, 9)]
    inference = 1 - float(rates[0][1].value)
    assert 0.1 < inference < 0.9
    assert float(rates[0][0]) != pytest.approx(inference, abs=1e-4)
    for rate, _ in rates[1:]:
        assert float(rate) == pytest.approx(inference, abs=1e-6)


def test_another_annealing_is_another_experiment(config, run):
    other = dataclasses.replace(config().router, anneal_steps=3)
    with pytest.raises(InputError, match=r"router\.anneal_steps is None there and 3 here"):
        train(config(router=other), run[0])
