"""Configurations from Python: objects, or names of files, with other values of some fields."""

import sys
import typing

import pytest

import dials_jax as dj
from dials_jax.config import EvalConfig, EvalTask, TrainConfig
from dials_jax.config_files import load_config, open_config
from dials_jax.errors import InputError


def test_fields_are_replaced_by_dotted_names():
    given = {"optimizer.num_steps": 3, "batch_size": 8}
    config = open_config("demo/model", TrainConfig, given)
    shipped = load_config("demo/model", TrainConfig)
    assert (config.optimizer.num_steps, config.batch_size) == (3, 8)
    assert config.model == shipped.model and shipped.optimizer.num_steps != 3
    again = {"optimizer.num_steps": shipped.optimizer.num_steps, "batch_size": shipped.batch_size}
    assert open_config(config, TrainConfig, again) == shipped


def test_a_field_of_one_of_several_tasks(untyped):
    config = open_config(
        "demo/sweep", EvalConfig, {"tasks.0.limit": 7, "tasks.0.sampler": dj.Dream(4)}
    )
    assert config.tasks[0].limit == 7 and config.tasks[0].sampler.max_new_tokens == 4
    with pytest.raises(InputError, match=r"number '9' is none of the \d there are"):
        open_config(config, EvalConfig, {"tasks.9.limit": 7})
    with pytest.raises(InputError, match="overrides='x': give values by name"):
        open_config(config, EvalConfig, "x")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"optimizer.num_step": 3},
            "OptimizerConfig has no field 'num_step'; did you mean",
        ),
        ({"optimizer.num_steps": "x"}, "num_steps='x' must be an integer"),
        ({"batch_size.x": 3}, "'x': 64 has no fields; give the field above as a whole"),
        ({"objective.lambda": 3}, "ObjectiveConfig has no field 'lambda'"),
    ],
)
def test_wrong_names_and_values_are_refused_before_anything_runs(
    overrides, message, tmp_path, untyped
):
    with pytest.raises(InputError, match=message):
        dj.train("demo/model", tmp_path / "run", overrides)
    assert not (tmp_path / "run").exists()


def test_another_kind_of_configuration_is_refused(tmp_path, untyped):
    with pytest.raises(
        InputError, match="demo/model is of class TrainConfig, but this command takes"
    ):
        dj.sweep("demo/model", tmp_path)
    with pytest.raises(
        InputError, match="the configuration is of class dict, but this command takes"
    ):
        dj.train({}, tmp_path)


BESIDE = """
from __future__ import annotations
from dataclasses import dataclass
import dials_jax as dj

@dataclass(frozen=True)
class Mine(dj.Confidence):
    other: dj.DualCache | None = None
"""


def test_a_configuration_may_import_what_lies_beside_it(tmp_path, monkeypatch):
    """Its own, although another one's has the same name, and also from where Python looks first."""
    for length, folder in [(3, tmp_path / "a"), (7, tmp_path / "b")]:
        folder.mkdir()
        (folder / "beside_a_configuration.py").write_text(f"{BESIDE}LENGTH = {length}\n")
        (folder / "own.py").write_text(
            "from beside_a_configuration import LENGTH, Mine\n"
            "from dials_jax.config import ArithmeticData, EvalTask\n"
            "def get_config():\n"
            "    own = {'data': ArithmeticData(), 'sampler': Mine(LENGTH)}\n"
            "    return EvalTask(name='sums', metric='exact_match', **own)\n"
        )
        monkeypatch.syspath_prepend(str(folder))
        before = list(sys.path)
        sampler = load_config(str(folder / "own.py"), EvalTask).sampler
        assert sampler.gen_length == length and sys.path == before
        # Its class still knows the names of its module.
        assert typing.get_type_hints(type(sampler))["other"] == dj.DualCache | None
