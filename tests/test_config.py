import dataclasses
import json
import math

import pytest

from dials_jax import config
from dials_jax.caching.early_skip.settings import EarlySkip
from dials_jax.caching.plain import DualCache
from dials_jax.config import (
    ArithmeticData,
    EvalConfig,
    EvalTask,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RouterConfig,
    TaskData,
    TextData,
    TrainConfig,
    from_dict,
    to_dict,
)
from dials_jax.errors import InputError, nearest
from dials_jax.files import read_json, replacing, write_json
from dials_jax.sampling.confidence import Confidence
from dials_jax.sampling.dream import Dream
from tests.conftest import small_config

OPTIMIZER = OptimizerConfig(num_steps=10, warmup_steps=1)
TRAIN = TrainConfig(model=small_config(), data=ArithmeticData(), optimizer=OPTIMIZER)
TASKS = (
    EvalTask(name="sums", metric="exact_match", data=ArithmeticData(operations=("add",))),
    EvalTask(
        name="choice", metric="choice", data=TaskData(paths=("a.jsonl",)), choices=("{x}", "y")
    ),
    EvalTask(name="text", metric="nelbo", data=TextData(length=8), limit=3),
    EvalTask(
        name="own",
        metric="exact_match",
        data=ArithmeticData(),
        sampler=Dream(4, top_p=0.9),
        cache=EarlySkip((1.0, 0.5), (0.0, 0.2), alpha=0.3),
    ),
)


@pytest.mark.parametrize(
    "value",
    [
        small_config(eot_id=3),
        RouterConfig(skip_threshold=0.2),
        TRAIN,
        TrainConfig(backbone="model", data=TaskData(), optimizer=OPTIMIZER),
        EvalConfig(model="model", tasks=TASKS, routers=("a", "b"), num_static=()),
    ],
)
def test_json_returns_the_same_configuration(value):
    found = from_dict(type(value), json.loads(json.dumps(to_dict(value))))
    assert found == value
    assert hash(found) == hash(value)  # tuples stay tuples: it can be a static argument


def changed(values, path, value):
    *parents, last = path
    inner = values
    for key in parents:
        inner = inner[key]
    inner[last] = value
    return values


@pytest.mark.parametrize(
    "path, message",
    [
        (("batchsize",), "unknown field 'batchsize'; did you mean 'batch_size'?"),
        (("model", "d_modle"), "model: unknown field 'd_modle'; did you mean 'd_model'?"),
        (("zzz",), "unknown field 'zzz'; valid names: .*batch_size"),
        (("data", "kind"), "unknown kind 3"),
    ],
)
def test_unknown_fields_name_the_nearest(path, message):
    with pytest.raises(InputError, match=message.replace("?", r"\?")):
        from_dict(TrainConfig, changed(to_dict(TRAIN), path, 3))


def test_a_missing_field_is_named():
    values = to_dict(small_config())
    del values["rope_theta"]
    with pytest.raises(InputError, match="field 'rope_theta' is missing"):
        from_dict(ModelConfig, values)


def test_nearest_lists_names_when_none_is_close():
    assert nearest("colour", ["color", "size"]) == "; did you mean 'color'?"
    assert nearest("x", ["size", "color"]) == "; valid names: color, size"


def optimizer(**changes):
    return OptimizerConfig(**({"num_steps": 10, "warmup_steps": 1} | changes))


def task(**changes):
    return EvalTask(**({"name": "text", "metric": "nelbo", "data": TextData()} | changes))


def generation(**changes):
    return EvalTask(name="text", metric="exact_match", data=ArithmeticData(), **changes)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: small_config(num_layers=0), "num_layers=0 must be positive"),
        (lambda: small_config(num_heads=4, num_kv_heads=3), "multiple of num_kv_heads=3"),
        (lambda: small_config(head_dim=7), "head_dim=7 must be even"),
        (lambda: small_config(mask_id=64), "mask_id=64 is outside the vocabulary of 64"),
        (lambda: small_config(eos_id=-1), "eos_id=-1 is outside"),
        (lambda: small_config(pad_id=99), "pad_id=99 is outside"),
        (lambda: RouterConfig(skip_threshold=1.0), "skip_threshold=1.0"),
        (lambda: RouterConfig(skip_threshold=-0.1), "skip_threshold=-0.1"),
        (lambda: RouterConfig(temperature=0.0), "temperature=0.0 must be positive"),
        (lambda: MeshConfig(fsdp=-1), "at most one axis may be -1"),
        (lambda: MeshConfig(tensor=0), "sizes are positive or -1"),
        (lambda: optimizer(num_epochs=1.0), "exactly one of num_steps and num_epochs"),
        (lambda: optimizer(num_steps=None), "exactly one of num_steps and num_epochs"),
        (lambda: optimizer(warmup_steps=None), "exactly one of warmup_steps and warmup_epochs"),
        (lambda: optimizer(clip_norm=0.0), "clip_norm=0.0 must be positive and finite"),
        (lambda: optimizer(learning_rate=-1e-3), "learning_rate=-0.001 must be positive"),
        (
            lambda: optimizer(learning_rate=float("nan")),
            "learning_rate=nan must be a finite number",
        ),
        (lambda: optimizer(b1=1.0), r"b1=1.0 must lie in \[0, 1\)"),
        (lambda: optimizer(b2=2.0), r"b2=2.0 must lie in \[0, 1\)"),
        (lambda: optimizer(weight_decay=-0.1), "weight_decay=-0.1 must not be negative"),
        (lambda: dataclasses.replace(TRAIN, backbone="x"), "either backbone= .* or model="),
        (lambda: dataclasses.replace(TRAIN, model=None), "either backbone= .* or model="),
        (lambda: task(bucket=0), "bucket=0 must be positive"),
        (lambda: task(max_programs=0), "max_programs=0 must be positive"),
        (lambda: task(name=" "), "a task has an empty name"),
        (lambda: task(cfg_scale=-1.0), "cfg_scale=-1.0 must not be negative"),
        (lambda: task(cache=DualCache()), r"cache=DualCache\(\) is for generation, but metric 'ne"),
        (lambda: task(sampler=Confidence(4)), r"sampler=Confidence\(.*\) is for generation"),
        (lambda: generation(cfg_scale=0.5), "cfg_scale=0.5 is of likelihoods"),
        (lambda: dataclasses.replace(TRAIN, num_microbatches=3), "batch_size=64 must be divisible"),
    ],
)
def test_wrong_values_are_refused_in_one_line(make, message):
    with pytest.raises(InputError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_every_configuration_is_hashable_and_frozen():
    classes = [c for c in vars(config).values() if dataclasses.is_dataclass(c)]
    assert len(classes) > 8
    assert all(c.__dataclass_params__.frozen for c in classes)


def test_json_files_hold_null_where_a_number_is_not_finite(tmp_path):
    path = tmp_path / "results.json"
    write_json(path, {"a": [1.5, math.nan, (math.inf, True)], "b": {"c": -math.inf}})
    values = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert values == {"a": [1.5, None, [None, True]], "b": {"c": None}}


def test_json_files(tmp_path):
    path = tmp_path / "deep" / "config.json"
    write_json(path, {"a": 1})
    assert read_json(path) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["config.json"]  # no temporary file is left
    with pytest.raises(InputError, match=r"other\.json is missing"):
        read_json(tmp_path / "other.json")
    path.write_text("{")
    with pytest.raises(InputError, match="is not valid JSON"):
        read_json(path)


def test_a_file_is_replaced_when_it_is_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "a.bin"
    with replacing(path) as file:
        file.write(b"one")
        assert not path.exists()
    with pytest.raises(KeyboardInterrupt), replacing(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"one"
    assert [p.name for p in path.parent.iterdir()] == ["a.bin"]


@pytest.mark.parametrize("changes", [{"dropout": 1.0}, {"dropout": -0.1}, {"backbone": "model"}])
def test_dropout_is_a_share_and_for_models_only(changes):
    with pytest.raises(InputError, match=r"dropout=.* must lie in .*, and be 0 for routers"):
        values = {"dropout": 0.1, "model": small_config()} | changes
        if "backbone" in changes:
            del values["model"]
        TrainConfig(data=ArithmeticData(), optimizer=OPTIMIZER, **values)
