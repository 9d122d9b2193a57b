"""Every file of configs/ stands for a run that could start, by the command that it names."""

import functools
import re
import runpy
import shlex
from pathlib import Path

import jax
import pytest

from dials_jax import sharding, trees
from dials_jax.commands import parse
from dials_jax.config import (
    EvalConfig,
    HarnessConfig,
    RouterConfig,
    ScheduleStudy,
    TrainConfig,
)
from dials_jax.models import families, transformer
from dials_jax.sampling.model_schedule import Schedule
from dials_jax.skipping.routed import init_routers
from dials_jax.studies.samples import check_schedules
from dials_jax.studies.settings import AnyStudy

ROOT = Path(__file__).parents[1]
FILES = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "configs").rglob("*.py"))
COMMANDS = {"train.py": TrainConfig, "eval.py": EvalConfig | HarnessConfig | AnyStudy}


def command_of(file):
    """The script and the arguments that the file's docstring gives."""
    text = runpy.run_path(str(ROOT / file))["__doc__"].replace("\\\n", " ")
    [line] = re.findall(r"^python (.*)$", text, re.MULTILINE)
    script, *arguments = shlex.split(line)
    return script, arguments


@pytest.mark.parametrize("file", FILES)
def test_the_command_in_the_docstring_works(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    script, arguments = command_of(file)
    assert arguments[:2] == ["--config", file]
    config, workdir = parse(COMMANDS[script], "", arguments)
    assert isinstance(config, COMMANDS[script])
    assert workdir.parts[0] == "runs"


@functools.cache  # most files share a model
def placed_parameters(cfg, router):
    """How many parameters a model has; each of them, and of its routers, has a place on a mesh."""
    key = jax.random.key(0)
    params = jax.eval_shape(lambda: transformer.init(cfg, key))
    sharding.param_shardings(params, sharding.make_mesh())
    routers = jax.eval_shape(lambda: init_routers(cfg.d_model, cfg.num_layers, router, key))
    sharding.param_shardings(routers, sharding.make_mesh(), "routers/")
    return trees.count_parameters(params)


@pytest.mark.parametrize("file", FILES)
def test_the_model_builds_with_a_place_for_every_parameter(file):
    config = runpy.run_path(str(ROOT / file))["get_config"]()
    if isinstance(config, EvalConfig | HarnessConfig):
        assert config.tasks
        return
    if isinstance(config, AnyStudy):
        if isinstance(config, ScheduleStudy):
            check_schedules(config, [Schedule.parse(text) for text in config.schedules])
        return
    assert isinstance(config.router, RouterConfig)
    assert placed_parameters(config.model or families.llada_8b(), config.router) > 0
