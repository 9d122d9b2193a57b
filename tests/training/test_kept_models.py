"""Models kept along the way of a training are those of trainings that end there."""

import dataclasses

import chex
import jax
import pytest

from dials_jax.errors import InputError
from dials_jax.loading import load
from dials_jax.training.checkpoint import Checkpoints
from dials_jax.training.loop import train
from dials_jax.training.run import claim_workdir, step_folder


@pytest.fixture
def constant(train_config):
    """Makes settings of `steps` steps at a constant rate, whose result is a moving average."""
    base = train_config().optimizer

    def make(steps=6, **changes):
        values = {"num_steps": steps, "lr_schedule": "constant", "ema": 0.9}
        return train_config(optimizer=dataclasses.replace(base, **values), **changes)

    return make


def params(folder):
    return jax.device_get(load(folder, layout="stacked").params)


def test_a_kept_model_is_bitwise_that_of_a_training_which_ends_there(constant, tmp_path):
    kept = constant(keep_models_at=(0, 3, 6), save_every=4)
    train(dataclasses.replace(kept, max_minutes=1e-9), tmp_path / "kept")  # stopped after a step
    state = train(kept, tmp_path / "kept")
    chex.assert_trees_all_equal(state, train(constant(), tmp_path / "whole"))
    train(constant(3), tmp_path / "short")
    found = {step: params(step_folder(tmp_path / "kept", step)) for step in (0, 3, 6)}
    chex.assert_trees_all_equal(found[3], params(tmp_path / "short"))
    chex.assert_trees_all_equal(found[6], params(tmp_path / "whole"))
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(found[0], found[3])
    assert step_folder(tmp_path / "kept", 3).name == "00000003"


def test_no_kept_model_is_lost_where_a_run_is_killed_as_it_saves(constant, tmp_path, monkeypatch):
    cfg = constant(keep_models_at=(2, 4), save_every=2)
    save = Checkpoints.save

    def save_and_die(self, step, *state):
        save(self, step, *state)
        if step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        train(cfg, tmp_path)
    monkeypatch.undo()
    assert int(train(cfg, tmp_path).step) == 6
    assert load(step_folder(tmp_path, 4)).config == cfg.model


def test_steps_that_are_never_kept_are_refused_before_training(constant, tmp_path):
    with pytest.raises(InputError, match="step 7 is after the last one, 6; leave it out"):
        train(constant(keep_models_at=(3, 7)), tmp_path / "late")
    assert not (tmp_path / "late").exists()
    train(constant(), tmp_path / "run")
    with pytest.raises(InputError, match="has taken 6 steps and kept no model of step 2"):
        train(constant(keep_models_at=(2,)), tmp_path / "run")
    with pytest.raises(InputError, match=r"keep_models_at=\(-1,\) has a negative step"):
        constant(keep_models_at=(-1,))


def test_routers_keep_no_models(train_config):
    with pytest.raises(InputError, match="is for training a model; leave it out for routers"):
        train_config("somewhere", keep_models_at=(1,))


def test_a_foreign_folder_in_place_of_a_kept_model_is_refused(constant, tmp_path):
    cfg = constant(keep_models_at=(2,))
    claim_workdir(tmp_path, cfg, {})
    foreign = step_folder(tmp_path, 2) / "model"
    foreign.mkdir(parents=True)
    (foreign / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="would be overwritten; move it away"):
        train(cfg, tmp_path)
