"""A run that is killed anywhere and continued is bitwise the run that was not."""

import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import pytest

from dials_jax import trees
from dials_jax.commands import load_config
from dials_jax.config import ArithmeticData, ObjectiveConfig, RouterConfig, TextData, TrainConfig
from dials_jax.errors import InputError
from dials_jax.files import read_json, write_json
from dials_jax.skipping.storage import router_facts
from dials_jax.stopping import Stopped
from dials_jax.training import checkpoint, loop, run
from dials_jax.training.checkpoint import Checkpoints
from dials_jax.training.loop import train
from dials_jax.training.metrics import MetricsWriter
from dials_jax.training.run import claim_workdir, require_same_experiment
from dials_jax.workdir import exclusive

ROOT = Path(__file__).parents[2]
OF_TIME = ("tokens_per_second", "digest")  # the latter of the whole line
CONFIG = """
from dials_jax.config import (
    ArithmeticData, ObjectiveConfig, OptimizerConfig, RouterConfig, TrainConfig
)
from dials_jax.models.families import llada_small

MODEL = llada_small(num_layers=2, d_model=32, vocab_size=19, mask_id=18, eos_id=1, pad_id=0,
              max_length=32, dtype="float32")

def get_config():
    return TrainConfig(
        {subject},
        router=RouterConfig(d_hidden=8, execute_bias=0.5),
        data=ArithmeticData(num_items=100),
        optimizer=OptimizerConfig(learning_rate=1e-2, num_steps=40, warmup_steps=5, ema=0.9),
        objective=ObjectiveConfig(kind="mdlm"),
        batch_size=8,
        num_microbatches=2,
        log_every=3,
        save_every=4,
    )
"""


def run_until(condition, config, workdir):
    """Starts training and kills it as soon as `condition(workdir)` holds."""
    process = subprocess.Popen(
        [sys.executable, "train.py", "--config", str(config), "--workdir", str(workdir)],
        cwd=ROOT,
        # As in this process, which runs the other half.
        env={**os.environ, "JAX_DEFAULT_MATMUL_PRECISION": "highest"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not condition(workdir):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def logged(workdir):
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def logged_step_10(workdir):
    return any(line["step"] >= 10 for line in logged(workdir))


def saves_after_step_20(workdir):
    partial = (workdir / "checkpoints").glob("*.partial")
    return any(int(p.name.partition(".")[0]) > 20 for p in partial)


def without_times(lines):
    return [{k: v for k, v in line.items() if k not in OF_TIME} for line in lines]


@pytest.mark.parametrize(
    ("kind", "kills"),
    [("model", [logged_step_10, saves_after_step_20]), ("routers", [saves_after_step_20])],
)
def test_killed_and_continued_equals_uninterrupted(
    kind, kills, arithmetic_model, tmp_path, monkeypatch
):
    config = tmp_path / "config.py"
    backbone = f"backbone={str(arithmetic_model)!r}"
    validated = "validation=ArithmeticData(num_items=16), validate_every=10, fit_execution=(0.8,)"
    subject = "model=MODEL, dropout=0.1" if kind == "model" else f"{backbone}, {validated}"
    config.write_text(CONFIG.format(subject=subject))
    cfg = load_config(str(config), TrainConfig)

    for condition in kills:
        run_until(condition, config, tmp_path / "killed")
    assert 10 <= logged(tmp_path / "killed")[-1]["step"] < 40
    if kind == "routers":  # killed once more, behind the last step
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(run, "fit_thresholds", interrupt)
            train(cfg, tmp_path / "killed")
    killed = train(cfg, tmp_path / "killed")
    whole = train(cfg, tmp_path / "whole")

    assert int(killed.step) == 40 and killed.average is not None
    chex.assert_trees_all_equal(killed, whole)
    digests = [
        json.loads((tmp_path / name / "checkpoints/00000040/digest.json").read_text())
        for name in ("killed", "whole")
    ]
    assert digests[0] == digests[1]
    lines = without_times(logged(tmp_path / "killed"))
    assert lines == without_times(logged(tmp_path / "whole"))
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps)) and {3, 4, 6, 39, 40} <= set(steps)
    if kind == "routers":
        fitted = [router_facts(tmp_path / name)[1].fitted for name in ("killed", "whole")]
        assert fitted[0] == fitted[1] and len(fitted[0]) == 1
        assert sum("validation/execution" in line for line in lines) == 4


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_asked_to_end_saves_its_step(signum, train_config, tmp_path, monkeypatch):
    cfg = train_config(log_every=1, save_every=4)
    write = MetricsWriter.write

    def write_then_stop(self, step, values):
        write(self, step, values)
        if step == 2:
            signal.raise_signal(signum)

    monkeypatch.setattr(MetricsWriter, "write", write_then_stop)
    message = "step 3 is saved in .*; the same command continues from there"
    with pytest.raises(Stopped, match=message) as stop:
        train(cfg, tmp_path / "run")
    assert stop.value.status == 128 + signum
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["00000003"]
    monkeypatch.undo()
    state, whole = train(cfg, tmp_path / "run"), train(cfg, tmp_path / "whole")
    chex.assert_trees_all_equal(state, whole)
    assert without_times(logged(tmp_path / "run")) == without_times(logged(tmp_path / "whole"))


@pytest.mark.parametrize("stops", [(1, 2), (4, 5), (2, 3, 7)])
def test_a_signal_leaves_no_trace_in_the_log(stops, train_config, tmp_path, monkeypatch):
    """Between two lines, or just at one: the next line is of the same steps as without it."""
    optimizer = dataclasses.replace(train_config().optimizer, num_steps=8)
    cfg = train_config(optimizer=optimizer, log_every=3, save_every=8)
    for before, stop in itertools.pairwise((0, *stops)):
        with monkeypatch.context() as patch, pytest.raises(Stopped, match=f"step {stop} is saved"):
            patch.setattr(loop.Clock, "is_over", signal_after(stop - before))
            train(cfg, tmp_path / "run")
        assert [x["step"] for x in logged(tmp_path / "run")] == [x for x in (3, 6) if x <= stop]
    state, whole = train(cfg, tmp_path / "run"), train(cfg, tmp_path / "whole")
    chex.assert_trees_all_equal(state, whole)
    assert [line["step"] for line in logged(tmp_path / "whole")] == [3, 6, 8]
    assert without_times(logged(tmp_path / "run")) == without_times(logged(tmp_path / "whole"))


def signal_after(steps):
    """A clock that is never over, and that sends SIGTERM when it is asked after so many steps."""
    asked = itertools.count(1)

    def is_over(self, meeting):
        if next(asked) == steps:
            signal.raise_signal(signal.SIGTERM)
        return False

    return is_over


def test_a_signal_during_a_save_takes_no_more_steps(train_config, tmp_path, monkeypatch):
    save = Checkpoints.save

    def save_and_stop(self, step, *state):
        signal.raise_signal(signal.SIGTERM)
        save(self, step, *state)

    monkeypatch.setattr(Checkpoints, "save", save_and_stop)
    with pytest.raises(Stopped, match="step 2 is saved"):
        train(train_config(save_every=2), tmp_path)
    assert Checkpoints(tmp_path / "checkpoints").steps() == [2]


def test_a_signal_waits_for_the_save_beside_training(train_config, tmp_path, monkeypatch):
    save_tree = checkpoint.save_tree

    def stop_and_save(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
        save_tree(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save_tree", stop_and_save)
    with pytest.raises(Stopped, match=r"step (\d) is saved") as stop:
        train(train_config(save_every=1), tmp_path)
    said = int(stop.value.message.split()[1])
    assert Checkpoints(tmp_path / "checkpoints").steps()[-1] == said


def test_a_save_that_fails_beside_training_ends_it(train_config, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise InputError("the disk is full")

    monkeypatch.setattr(checkpoint, "save_tree", fail)
    for settings in ({"save_every": 1}, {}):  # a step's; that of the last step
        with pytest.raises(InputError, match="the disk is full"):
            train(train_config(**settings), tmp_path)
        assert not (tmp_path / "model").exists()


def test_before_a_step_is_saved_that_is_what_is_said(train_config, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "init_train_state", interrupt)
    with pytest.raises(Stopped, match="no step is saved yet; the same command starts again"):
        train(train_config(), tmp_path)


def test_dropout_reaches_the_loss(tmp_path, train_config):
    for name, share in (("without", 0.0), ("with", 0.5)):
        train(train_config(dropout=share, log_every=1), tmp_path / name)
    a, b = (logged(tmp_path / name) for name in ("without", "with"))
    assert a[0]["masked_share"] == b[0]["masked_share"] and a[0]["loss"] != b[0]["loss"]


def test_a_run_from_before_a_setting_existed_goes_on(tmp_path, train_config):
    cfg = train_config()
    state = train(cfg, tmp_path)
    path = tmp_path / "config.json"
    old = read_json(path)
    del old["train"]["dropout"]
    path.write_text(json.dumps(old))
    again = train(cfg, tmp_path)
    chex.assert_trees_all_equal(state, again)


@pytest.mark.parametrize("content", ['{"model_type": "llada"}', '{"train": {"zzz": 1}}'])
def test_a_folder_with_another_config_is_no_workdir(content, tmp_path, train_config):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"holds another experiment .*; choose another --workdir"):
        train(train_config(), tmp_path)
    assert (tmp_path / "config.json").read_text() == content


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Makes a copy of a finished run of a configuration, which is trained once."""
    runs = {}

    def copy(cfg, folder):
        if cfg not in runs:
            runs[cfg] = tmp_path_factory.mktemp("finished")
            train(cfg, runs[cfg])
        return shutil.copytree(runs[cfg], folder)

    return copy


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"data": ArithmeticData(num_items=150)}, "data.num_items is 200 there and 150 here"),
        ({"objective": ObjectiveConfig(min_mask_ratio=0.1)}, "objective.min_mask_ratio is 0.001"),
    ],
)
def test_the_workdir_of_another_experiment_is_refused(
    changes, field, train_config, finished, tmp_path
):
    workdir = finished(train_config(), tmp_path / "run")
    with pytest.raises(InputError, match=f"holds another experiment \\({field}"):
        train(train_config(**changes), workdir)


def test_what_only_concerns_logs_and_saves_may_change(train_config, finished, tmp_path):
    workdir = finished(train_config(), tmp_path / "run")
    state = train(train_config(log_every=1, save_every=5, keep_checkpoints=1), workdir)
    assert int(state.step) == 6


def with_optimizer(cfg, **changes):
    return dataclasses.replace(cfg, optimizer=dataclasses.replace(cfg.optimizer, **changes))


@pytest.fixture
def constant(train_config):
    return with_optimizer(train_config(), lr_schedule="constant")


def test_other_microbatches_and_layouts_go_on_with_the_same_bits(constant, finished, tmp_path):
    """Layers are stored as the run had them and come back as this one wants them."""
    workdir = finished(constant, tmp_path / "run")
    first = train(constant, workdir)
    for changes in ({"layout": "unrolled"}, {"num_microbatches": 2, "save_every": 3}, {}):
        cfg = dataclasses.replace(constant, **changes)
        state = train(cfg, workdir)
        assert trees.is_unrolled(state.params["layers"]) == (cfg.layout == "unrolled")
        stacked = trees.relayout(state, unrolled=False)
        chex.assert_trees_all_equal(stacked, first)


def test_layers_stored_unrolled_come_back_stacked(constant, tmp_path):
    cfg = with_optimizer(constant, num_steps=2, ema=0.9)
    unrolled = train(dataclasses.replace(cfg, layout="unrolled"), tmp_path)
    assert trees.is_unrolled(unrolled.opt_state[1][0].mu["layers"])
    state = train(cfg, tmp_path)
    chex.assert_trees_all_equal(state, trees.relayout(unrolled, unrolled=False))


def test_more_steps_at_a_constant_rate_are_the_longer_run(constant, finished, tmp_path):
    longer = with_optimizer(constant, num_steps=8)
    state = train(longer, finished(constant, tmp_path / "run"))
    chex.assert_trees_all_equal(state, train(longer, tmp_path / "whole"))
    assert without_times(logged(tmp_path / "run")) == without_times(logged(tmp_path / "whole"))


def resumes(before, cfg, workdir, step=6, epoch=25):
    """Raises what a run of `cfg` does on a workdir of `before` with a checkpoint of that step."""
    workdir.mkdir(exist_ok=True)
    claim_workdir(workdir, before, {})
    require_same_experiment(workdir, cfg, {}, epoch, step)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_steps": 60},
        {"num_steps": 6},
        {"num_steps": None, "num_epochs": 2.0},
        {"warmup_steps": 5, "num_steps": 60},  # done already
        {"warmup_steps": None, "warmup_epochs": 0.2},
        {"final_scale": 0.5},  # of a cosine
    ],
)
def test_settings_go_on_that_leave_the_rates_from_here_on(changes, constant, tmp_path):
    resumes(constant, with_optimizer(constant, **changes), tmp_path)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"num_steps": 5}, "has taken 6 steps and 5 are asked for"),
        ({"learning_rate": 0.1}, "optimizer.learning_rate is 0.01 there and 0.1 here, which chang"),
        ({"num_steps": 60, "warmup_steps": 20}, "which changes the learning rates"),
        ({"lr_schedule": "cosine"}, "optimizer.lr_schedule is 'constant' there and 'cosine' here"),
        ({"b1": 0.5}, r"optimizer.b1 is 0.9 there and 0.5 here\); choose another --workdir"),
    ],
)
def test_settings_that_change_what_is_to_come_are_refused(changes, problem, constant, tmp_path):
    before = with_optimizer(constant, num_steps=50)
    with pytest.raises(InputError, match=problem):
        resumes(before, with_optimizer(before, **changes), tmp_path)


def test_a_cosine_cannot_become_longer(train_config, tmp_path):
    """Its rates all hang on its length; the model can be trained on under a new schedule."""
    cfg = train_config()
    resumes(cfg, with_optimizer(cfg, num_steps=None, num_epochs=0.24), tmp_path)  # as long
    for step in (2, 6):
        with pytest.raises(InputError, match=r"learning rates .*or choose another --wo"):
            resumes(cfg, with_optimizer(cfg, num_steps=12), tmp_path, step)
    (tmp_path / "model").mkdir()  # as a training that ended has it
    with pytest.raises(InputError, match=r"learning rates of its steps.*--init-from .*/model"):
        resumes(cfg, with_optimizer(cfg, num_steps=12), tmp_path, 6)


def test_what_is_only_for_routers_does_not_concern_a_model(train_config, tmp_path):
    cfg = train_config()
    objective = dataclasses.replace(cfg.objective, skip_weight=0.5, scale_skip_by_mask_ratio=False)
    changes = {"objective": objective, "router": RouterConfig(d_hidden=4)}
    resumes(cfg, dataclasses.replace(cfg, **changes), tmp_path)
    router = train_config("model")
    with pytest.raises(InputError, match=r"router.d_hidden is 8 there and 4 here"):
        resumes(router, dataclasses.replace(router, **changes), tmp_path / "router")


def test_a_model_may_move_and_keeps_its_fingerprint(train_config, tmp_path):
    resumes(train_config("here/model"), train_config("there/model"), tmp_path)


OURS = ["checkpoints", "metrics.jsonl", "tensorboard", "training.png"]


@pytest.mark.parametrize("name", [*OURS, "model", "model.unfinished", "tokenizer.json"])
def test_what_a_training_did_not_make_is_refused_before_it_starts(name, train_config, tmp_path):
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match=f"{name} was not made by a run of this folder"):
        train(train_config(), tmp_path)
    assert sorted(p.name for p in tmp_path.rglob("*")) == sorted([name, "thesis.txt"])


@pytest.mark.parametrize(
    "name", ["model", "model.unfinished", "checkpoints/00000002", "checkpoints/00000002.partial"]
)
def test_nor_does_a_run_that_goes_on_take_foreign_folders_for_its_own(name, train_config, tmp_path):
    claim_workdir(tmp_path, train_config(), {})
    (tmp_path / name).mkdir(parents=True)
    (tmp_path / name / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="move it away"):
        train(train_config(), tmp_path)
    assert (tmp_path / name / "thesis.txt").exists()


def test_a_second_training_on_a_workdir_is_refused(train_config, tmp_path):
    with exclusive(tmp_path), pytest.raises(InputError, match="is in use by process"):
        train(train_config(), tmp_path)


def test_a_run_goes_on_where_its_data_was_moved_to(train_config, arithmetic_model, tmp_path):
    def reading(name, text):
        (tmp_path / name).mkdir()
        (tmp_path / name / "digits.txt").write_text(text)
        data = TextData(
            paths=(str(tmp_path / name),), cache=str(tmp_path / name / "cache"),
            tokenizer=str(arithmetic_model), length=8,
        )  # fmt: skip
        return train_config(data=data)

    state = train(reading("here", "0123456789" * 20), tmp_path / "run")
    again = train(reading("there", "0123456789" * 20), tmp_path / "run")
    chex.assert_trees_all_equal(state, again)
    with pytest.raises(InputError, match="holds another experiment \\(data_fingerprint"):
        train(reading("other", "9876543210" * 20), tmp_path / "run")


def test_routers_do_not_continue_on_another_backbone(
    train_config, arithmetic_model, other_model, tmp_path
):
    backbone = shutil.copytree(arithmetic_model, tmp_path / "model")
    train(train_config(backbone), tmp_path / "run")
    known = read_json(tmp_path / "run" / "config.json")
    # A version before knew half of it.
    shorter = known | {"backbone_fingerprint": known["backbone_fingerprint"][:16]}
    write_json(tmp_path / "run" / "config.json", shorter)
    train(train_config(backbone), tmp_path / "run")
    assert read_json(tmp_path / "run" / "config.json") == known
    shutil.rmtree(backbone)
    shutil.copytree(other_model, backbone)
    with pytest.raises(InputError, match="holds another experiment \\(backbone_fingerprint"):
        train(train_config(backbone), tmp_path / "run")
