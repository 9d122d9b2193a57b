"""What is at another address than a local path is refused in one line, before any work."""

import re
import sys
from typing import Annotated, Literal, get_args, get_origin

import pytest

import dials_jax as dj
from dials_jax import config
from dials_jax.cli import main as cli
from dials_jax.config.typed import Local, Typed, field_hints
from dials_jax.data.tokenizer_training import train_tokenizer
from dials_jax.errors import InputError
from dials_jax.evaluation import harness
from dials_jax.evaluation.task import EvalConfig
from dials_jax.models import folders, groups
from dials_jax.studies.settings import AnyStudy, RepresentationStudy

ADDRESSES = ["gs://bucket/x", "s3://bucket/x"]

# Texts of settings that name no file or folder.
NO_PATHS = {
    "adapted", "answer", "choice_list", "choices",
    "dataset_config", "dataset_split", "description", "extract", "few_shot_by",
    "few_shot_delimiter", "gen_kwargs", "heavy", "label", "label_names",
    "light", "mean_over", "model_type", "name", "operations", "program", "prompt", "schedules",
    "second_heavy", "static_layers", "system_instruction", "target_delimiter",
    "tasks", "text_field", "until",
}  # fmt: skip


def texts_of(hint):
    """Whether each text that a hint holds is a path."""
    if get_origin(hint) is Annotated:
        return [Local in get_args(hint)] if get_args(hint)[0] is str else []
    if hint is str:
        return [False]
    if get_origin(hint) in (None, Literal):
        return []
    return [found for part in get_args(hint) for found in texts_of(part)]


def settings_classes():
    """Those that the commands take, and all that their fields hold."""
    found, new = set(), [config.TrainConfig, EvalConfig, harness.HarnessConfig, *get_args(AnyStudy)]
    while new:
        found.update(new)
        hints = [hint for cls in new for hint in field_hints(cls).values()]
        new = [cls for hint in hints for cls in held_by(hint) if cls not in found]
    return found


def held_by(hint):
    """The settings that a hint allows."""
    if isinstance(hint, type) and issubclass(hint, Typed):
        return [hint]
    return [cls for part in get_args(hint) for cls in held_by(part)]


def test_every_text_of_the_settings_is_known_to_be_a_path_or_none():
    """A new field that names a file must say so, and is then refused as the others are."""
    classes = settings_classes()
    assert len(classes) > 20
    seen = set()
    for cls in classes:
        for name, hint in field_hints(cls).items():
            if texts := texts_of(hint):
                assert any(texts) is (name not in NO_PATHS), f"{cls.__name__}.{name}"
                seen.add(name)
    assert NO_PATHS <= seen


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize(
    "make",
    [
        lambda at: config.TextData(paths=("texts", at)),
        lambda at: config.TextData(tokenizer=at),
        lambda at: config.TextData(cache=at),
        lambda at: config.CorpusData(folder=at),
        lambda at: config.CorpusData(folder="x", dataset=at),
        lambda at: config.TaskData(few_shot=(at, 2)),
        lambda at: config.EvalConfig(model=at),
        lambda at: config.EvalConfig(model="x", routers=("y", at)),
        lambda at: config.ProposeStudy(search=at),
        lambda at: harness.HarnessModel(path="x", store=at),
        lambda at: harness.HarnessConfig(
            model=harness.HarnessModel(path="x"), tasks=("gsm8k",), include_path=at
        ),
        lambda at: RepresentationStudy(models=(("a", at),), data=config.ArithmeticData()),
    ],
)
def test_settings_refuse_an_address(make, address):
    with pytest.raises(InputError, match=f"={address} is no local path, .*; mount or copy it"):
        make(address)


@pytest.fixture
def nothing_is_read(monkeypatch):
    """No weights are read."""

    def refuse(*args, **kwargs):
        raise AssertionError("weights are read")

    for module, name in ((folders, "load_model"), (folders, "read_group"), (groups, "assemble")):
        monkeypatch.setattr(module, name, refuse)


COMMANDS = [
    "train --config {at} --workdir runs/x",
    "train --config demo/model --workdir {at}",
    "train --config demo/model --workdir {at} --compile-for cpu:1",
    "train --config demo/model --workdir x --init-from {at}",
    "train --config demo/router --workdir x --backbone {at}",
    "train --config text/model --workdir x --data.cache {at}",
    "train --config text/model --workdir x --data.paths {at}",
    "eval --config demo/sweep --workdir {at}",
    "eval --config demo/sweep --workdir x --model {at}",
    "eval --config demo/sweep --workdir x --routers {at}",
    "eval --config llada/harness --workdir x --model.store {at}",
    "prepare --config mdlm/blocks_12 --data.folder {at}",
    "convert {at} out",
    "convert {model} {at}",
    "export {at} --out out",
    "export {model} --out {at}",
    "tokenizer train --text {at} --vocab-size 300 --out out",
    "tokenizer train --text {model} --vocab-size 300 --out {at}",
    "generate {at} --prompt 1",
    "generate {model} --prompt 1 --router {at}",
    "generate {model} --prompt 1 --tokenizer {at}",
    "generate {model} --file {at}",
    "generate {model} --prompt 1 --out {at}",
    "chat {at}",
    "chat {model} --tokenizer {at}",
    "watch {at} --prompt 1",
    "watch {model} --prompt 1 --light {at} --schedule L1,H1",
    "watch {model} --prompt 1 --router {at}",
    "watch {model} --prompt 1 --out {at}",
    "bench {at}",
    "bench {model} --policies router={at}",
    "bench {model} --tokenizer {at} --prompt 1",
    "bench {model} --file {at}",
    "compare {at}",
    "compare {model} --out {at}",
    "retention {at}",
    "retention {model} --out {at}",
    "lm-eval run --model dials --tasks x --model_args path={model} --output_path {at}",
    "lm-eval run --model dials --tasks x --model_args path={model} --include_path {at}",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_refuses_an_address_before_any_work(
    command, arithmetic_model, nothing_is_read, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    for address in ADDRESSES:
        words = command.format(at=address, model=arithmetic_model).split()
        with pytest.raises(SystemExit) as stop:
            cli.dials(words)
        said = capsys.readouterr().err.strip()
        assert stop.value.code == 2, said
        assert re.fullmatch(rf"error: [^\n]*{address} is no local path, [^\n]*", said), said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "call",
    [
        lambda at, model: dj.load(at),
        lambda at, model: dj.load_router(at, model),
        lambda at, model: dj.load_tokenizer(at),
        lambda at, model: dj.load_results(at),
        lambda at, model: dj.generate_text(model, ["1"], tokenizer=at),
        lambda at, model: dj.export_model(model, at),
        lambda at, model: dj.export_model(at, "out"),
        lambda at, model: dj.train("demo/model", at),
        lambda at, model: dj.train(at, "runs/x"),
        lambda at, model: dj.train("demo/model", "x", {"init_from": at}),
        lambda at, model: dj.sweep("demo/sweep", at),
        lambda at, model: dj.sweep("demo/sweep", "x", {"routers": (at,)}),
        lambda at, model: train_tokenizer([at], 300, "out"),
        lambda at, model: train_tokenizer(["x"], 300, at),
        lambda at, model: folders.save_model(at, model.config, model.params),
    ],
)
def test_a_function_refuses_an_address_before_any_work(call, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for address in ADDRESSES:
        with pytest.raises(InputError, match=f"{address} is no local path"):
            call(address, model)
    assert list(tmp_path.iterdir()) == []
