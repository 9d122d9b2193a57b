"""Every field has the type it claims, whether it comes from Python, a command line or JSON."""

import dataclasses
import json
import math
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import pytest

from dials_jax import config
from dials_jax.caching.early_skip.settings import EarlySkip
from dials_jax.caching.parse import parse_cache
from dials_jax.commands import override
from dials_jax.config import (
    ArithmeticData,
    CorpusData,
    EvalConfig,
    EvalTask,
    ImportanceStudy,
    MeshConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ProposeStudy,
    Range,
    RouterConfig,
    SamplingStudy,
    ScheduleStudy,
    SearchStudy,
    Seed,
    TaskData,
    TextData,
    TrainConfig,
    Typed,
    as_type,
    from_dict,
    to_dict,
    typed,
)
from dials_jax.data.tokenizer import load_tokenizer
from dials_jax.errors import InputError
from dials_jax.evaluation.pairs import pad_pairs
from dials_jax.files import parse_json, read_json
from dials_jax.loading import load
from dials_jax.sampling.ancestral import Ancestral
from dials_jax.sampling.confidence import Confidence
from dials_jax.sampling.dream import Dream
from dials_jax.sampling.generate import generate
from dials_jax.sampling.model_schedule import Schedule
from dials_jax.skipping.routed import Routed, as_threshold, check_router
from tests.conftest import small_config

MODELS = (("H", "runs/heavy"), ("L", "runs/light"))
TASK = EvalTask(name="sums", metric="exact_match", data=ArithmeticData())
OPTIMIZER = OptimizerConfig(num_steps=10, warmup_steps=1)
VALID = [
    TextData(),
    CorpusData(folder="corpus"),
    TaskData(),
    ArithmeticData(),
    TASK,
    EvalConfig(model="model", tasks=(TASK,)),
    small_config(),
    RouterConfig(),
    MeshConfig(),
    OPTIMIZER,
    ObjectiveConfig(),
    TrainConfig(model=small_config(), data=ArithmeticData(), optimizer=OPTIMIZER),
    SamplingStudy(models=MODELS, scorer="gpt2"),
    ScheduleStudy(models=MODELS, scorer="gpt2", schedules=("H4",)),
    SearchStudy(models=MODELS, scorer="gpt2"),
    ImportanceStudy(models=MODELS, data=TextData()),
    ProposeStudy(search="runs/search"),
]
FIELDS = [
    pytest.param(value, field.name, id=f"{type(value).__name__}.{field.name}")
    for value in VALID
    for field in dataclasses.fields(value)
]


def is_closed(valid, name):
    hint = typing.get_type_hints(type(valid))[name]
    return Literal in map(typing.get_origin, (hint, *typing.get_args(hint)))


pytestmark = pytest.mark.usefixtures("untyped")  # no other check stands before ours


def test_every_settings_class_is_typed_and_tried_here():
    classes = {
        c for c in vars(config).values() if isinstance(c, type) and dataclasses.is_dataclass(c)
    } - {Range}
    assert all(issubclass(c, Typed) for c in classes)
    assert classes <= {type(value) for value in VALID} | {SamplingStudy}


@pytest.mark.parametrize(("valid", "name"), FIELDS)
def test_every_field_refuses_a_value_of_another_type_in_one_line(valid, name):
    with pytest.raises(InputError, match=f"^{name}=") as error:
        dataclasses.replace(valid, **{name: object()})
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=f"^here: {name}="):
        from_dict(type(valid), {**vars(valid), name: object()}, "here")


@pytest.mark.parametrize(("valid", "name"), [p for p in FIELDS if is_closed(*p.values)])
def test_every_closed_set_names_the_nearest(valid, name):
    hint = typing.get_type_hints(type(valid))[name]
    closed = next(x for x in (hint, *typing.get_args(hint)) if typing.get_origin(x) is Literal)
    right = typing.get_args(closed)[0]
    with pytest.raises(InputError, match=f"{name}='{right}x' is not known; did you mean '{right}'"):
        dataclasses.replace(valid, **{name: f"{right}x"})


def test_a_statistic_that_does_not_exist_is_not_another_one():
    with pytest.raises(InputError, match="aggregate='median' is not known"):
        ScheduleStudy(models=MODELS, scorer="gpt2", schedules=("H4",), aggregate="median")


@pytest.mark.parametrize("valid", VALID, ids=lambda v: type(v).__name__)
def test_json_gives_back_the_same_settings(valid):
    found = from_dict(type(valid), json.loads(json.dumps(to_dict(valid))))
    assert found == valid and hash(found) == hash(valid)


@pytest.mark.parametrize(
    ("hint", "given", "meant"),
    [
        (int, np.int64(3), 3),
        (int, np.array(3), 3),
        (float, 3, 3.0),
        (float, np.float32(0.5), 0.5),
        (bool, np.True_, True),
        (str, Path("runs/x"), "runs/x"),
        (tuple[str, ...], ["a", "b"], ("a", "b")),
        (tuple[int, ...], np.arange(3), (0, 1, 2)),
        (tuple[int, ...], range(2), (0, 1)),
        (tuple[tuple[str, str], ...], [["H", "a"]], (("H", "a"),)),
        (tuple[float, ...], [1, 0.5], (1.0, 0.5)),
        (int | None, None, None),
        (dict[str, float], {"a": 1}, {"a": 1.0}),
        (Literal["a", "b"], np.str_("b"), "b"),
        (Annotated[int, Range(0, 2**63 - 1)], 2**40, 2**40),
        (Any, "3", "3"),
    ],
)
def test_harmless_differences_are_mended(hint, given, meant):
    found = as_type(hint, given, "x")
    assert found == meant and type(found) is type(meant)
    if isinstance(meant, tuple):
        assert [type(item) for item in found] == [type(item) for item in meant]


@pytest.mark.parametrize(
    ("hint", "given", "message"),
    [
        (int, True, "x=True must be an integer"),
        (int, np.True_, "must be an integer"),
        (int, 3.0, "x=3.0 must be an integer"),
        (int, "3", "x='3' must be an integer"),
        (int, None, "x=None must be an integer"),
        (int | None, "3", "x='3' must be an integer or None"),
        (int, 2**31, "x=2147483648 must lie in -2147483648 to 2147483647"),
        (int, 10**5000, "x=a int must lie in"),
        (float, True, "x=True must be a number"),
        (float, "0.5", "x='0.5' must be a number"),
        (float, math.nan, "x=nan must be a finite number"),
        (float | None, -math.inf, "x=-inf must be a finite number"),
        (float, 10**400, "must be a finite number"),
        (float, 1j, "must be a number"),
        (bool, 1, "x=1 must be True or False"),
        (bool, "false", "x='false' must be True or False"),
        (bool | None, "no", "must be True or False or None"),
        (str, None, "x=None must be a text"),
        (str, b"a", "must be a text"),
        (str, "a\udcff", "holds bytes that are no UTF-8"),
        (tuple[str, ...], "data/a.txt", r"x is a text; give a tuple, as \('data/a.txt',\)"),
        (tuple[str, ...], Path("a"), r"x is a text; give a tuple, as \('a',\)"),
        (tuple[int, ...], 3, r"x=3 is no tuple; give one, as \(..., \)"),
        (tuple[int, ...], {1, 2}, "is no tuple"),
        (tuple[int, ...], (1, "2"), "x='2' must be an integer"),
        (tuple[int, ...], np.array(3), "x=3 is no tuple"),
        (tuple[tuple[str, str], ...], (("H",),), r"x: \('H',\) has 1 parts, not 2"),
        (tuple[tuple[str, str], ...], ("H", "a"), "x is a text"),
        (Literal["mean", "corpus"], "maen", "x='maen' is not known; did you mean 'mean'"),
        (Literal["mean", "corpus"], 3, "x=3 must be one of mean, corpus"),
        (Literal["mean", "corpus"] | None, ["mean"], "must be one of mean, corpus or None"),
        (RouterConfig, 3, "x=3 must be a RouterConfig"),
        (TextData | TaskData, RouterConfig(), "must be a TextData or a TaskData"),
        (RouterConfig, RouterConfig, "x=RouterConfig must be a RouterConfig"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_other_types_are_refused(hint, given, message):
    with pytest.raises(InputError, match=message) as error:
        as_type(hint, given, "x")
    assert len(str(error.value)) < 200 and "\n" not in str(error.value)


@pytest.mark.parametrize("seed", [-1, 2**32, 10**30])
def test_seeds_beyond_32_bits_are_refused_wherever_they_are_given(seed):
    assert all(
        field.type == "Seed"
        for v in VALID
        for field in dataclasses.fields(v)
        if "seed" in field.name
    )
    with pytest.raises(InputError, match=r"seed=.* must lie in 0 to 4294967295"):
        EvalConfig(model="model", seed=seed)
    with pytest.raises(InputError, match=r"seed=.* must lie in 0 to 4294967295"):
        override(EvalConfig(model="model"), [f"--seed={seed}"])


def test_seeds_of_32_bits_have_keys_of_their_own():
    seeds = [as_type(Seed, n, "seed") for n in (0, 1, 2**31 - 1, 2**31, 2**32 - 1)]
    keys = [jax.random.key_data(jax.random.key(n)).tolist() for n in seeds]
    assert len({tuple(key) for key in keys}) == len(seeds)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "9" * 5000, "{", "\ufeffx"], ids=range(5)
)
def test_json_that_cannot_be_read_is_refused_in_one_line(tmp_path, text):
    with pytest.raises(InputError, match=r"^a\.jsonl, line 3 is not valid JSON: ") as error:
        parse_json(text, "a.jsonl, line 3")
    assert "\n" not in str(error.value)
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match=r"a\.json is not valid JSON"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize(("name", "message"), [("a" * 300, "cannot be read"), (".", "is missing")])
def test_names_that_are_no_files_are_refused(tmp_path, name, message):
    with pytest.raises(InputError, match=message):
        read_json(tmp_path / name)


ODD = [None, "x", b"x", 1.5, math.nan, True, -1, 2**40, [1], {"a": 1}, object(), np.zeros((2, 2))]


@pytest.mark.parametrize("odd", ODD, ids=lambda x: type(x).__name__)
@pytest.mark.parametrize(
    ("function", "right", "names"),
    [
        (Schedule.parse, {}, "text"),
        (Schedule.sandwich, {"steps": 8, "light_steps": 2}, "steps light_steps light heavy"),
        (Schedule.quarter, {"number": 1, "steps": 8}, "number steps heavy"),
        (Schedule.coarse, {"num_segments": 2, "chosen": (0,), "steps": 8}, "num_segments steps"),
        (load, {"path": "no/such/folder"}, "path dtype mesh layout"),
        (load_tokenizer, {}, "path"),
        (parse_cache, {}, "text"),
        (Confidence, {"gen_length": 8, "block_length": 8, "steps": 8}, "gen_length remasking"),
        (Dream, {"max_new_tokens": 8, "steps": 8}, "steps alg"),
        (Ancestral, {"length": 8, "steps": 8}, "length precision first_hitting"),
        (EarlySkip, {}, "proportions depths prompt_every indicator"),
        (as_threshold, {}, "value"),
        (pad_pairs, {"pairs": [([3], [4])], "cfg": small_config()}, "pairs cfg length"),
    ],
    ids=lambda x: getattr(x, "__qualname__", ""),
)
def test_public_functions_refuse_odd_arguments_in_one_line(function, right, names, odd):
    harmless = {
        "first_hitting=True", "dtype=None", "mesh=None", "heavy='x'", "light='x'",
        "Dream.steps=None", "as_threshold.value=[1]",
    }  # fmt: skip
    for name in names.split():
        if harmless & {f"{name}={odd!r}", f"{function.__qualname__}.{name}={odd!r}"}:
            continue
        with pytest.raises(InputError) as error:
            function(**{**right, name: odd})
        assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize(
    "pair",
    [
        ([3.9], [4]), ([True, 3], [4]), ([3], [4], [5]), 3, "ab", ([2**40], [4]), ([3], [-1]),
        (3, 4), ([[3]], [[4]]), ("a", "b"), (None, [3]), ([3], [63]), ([3], []),
        ([3], np.array([4.0])), ([3], [4, np.True_]), ([3], [2**32 + 4]),
    ],
    ids=str,
)  # fmt: skip
def test_a_likelihood_is_of_token_ids_only(pair):
    with pytest.raises(InputError):
        pad_pairs([pair], small_config())


@pytest.mark.parametrize("path", ["runs/router", Path("runs/router")])
def test_a_policy_of_a_path_says_how_to_load_it(path):
    with pytest.raises(InputError, match="give what load_router"):
        Routed(path)


@pytest.mark.parametrize(
    "router", ["x", {}, None, [1], {"a": 3}, object()], ids=lambda x: type(x).__name__
)
def test_a_policy_without_routers_is_refused(router):
    with pytest.raises(InputError, match="the router holds no arrays"):
        check_router(router, 4)


# ------------------------------------------------------------------------------ renamed fields

RENAMED_VALUES = [
    (RouterConfig, {"threshold": 0.3}, RouterConfig(skip_threshold=0.3)),
    (ObjectiveConfig, {"min_ratio": 2e-3}, ObjectiveConfig(min_mask_ratio=2e-3)),
    (
        OptimizerConfig,
        {"num_steps": 5, "warmup_steps": 1, "schedule": "constant"},
        OptimizerConfig(num_steps=5, warmup_steps=1, lr_schedule="constant"),
    ),
]


def train_values(**changes):
    values = to_dict(TrainConfig(model=small_config(), data=ArithmeticData(), optimizer=OPTIMIZER))
    return {name: x for name, x in values.items() if name != "layout"} | changes


@pytest.mark.parametrize(("cls", "stored", "meant"), RENAMED_VALUES)
def test_stored_settings_are_read_under_their_old_names(cls, stored, meant):
    assert from_dict(cls, stored) == meant
    assert from_dict(cls, to_dict(meant)) == meant


@pytest.mark.parametrize(("unrolled", "layout"), [(True, "unrolled"), (False, "stacked")])
def test_a_stored_run_says_of_its_layers_whether_they_are_unrolled(unrolled, layout):
    values = train_values(unrolled=unrolled)
    values["optimizer"]["schedule"] = values["optimizer"].pop("lr_schedule")
    values["model"]["shift"] = values["model"].pop("right_shift")
    assert from_dict(TrainConfig, values).layout == layout


def test_settings_under_both_names_are_refused():
    with pytest.raises(InputError, match="'threshold' is now 'skip_threshold'; give only that"):
        from_dict(RouterConfig, {"threshold": 0.1, "skip_threshold": 0.2})


def test_from_python_the_old_name_is_refused_with_the_new_one():
    with pytest.raises(InputError, match=r"^'threshold' of RouterConfig is now 'skip_threshold'"):
        RouterConfig(threshold=0.3)
    with pytest.raises(InputError, match="'unrolled' of TrainConfig is now 'layout'"):
        dataclasses.replace(
            TrainConfig(model=small_config(), data=ArithmeticData(), optimizer=OPTIMIZER),
            unrolled=True,
        )
    with pytest.raises(InputError, match=r"'steps' of EvalTask is now sampler=...\(steps=...\);"):
        EvalTask(name="sums", steps=16)
    both = "'random' of EvalConfig is now 'num_random', 'static' of EvalConfig is now 'num_static'"
    with pytest.raises(InputError, match=f"^{both}; rename them$"):
        EvalConfig(random=(1,), static=(2,), model="runs/model")


def test_every_renamed_field_has_the_new_name_and_not_the_old_one():
    for valid in VALID:
        names = {field.name for field in dataclasses.fields(valid)}
        new = {name.partition(".")[0] for name in valid.RENAMED.values()}  # "sampler.steps"
        assert new <= names and not valid.RENAMED.keys() & names


def test_an_argument_of_an_unknown_name_is_one_line_with_the_nearest():
    with pytest.raises(InputError, match=r"^generate takes no argument 'num_rows'; .*num_sequence"):
        generate(None, num_rows=3, sampler=None)
    with pytest.raises(InputError, match=r"'num_sequencs'; did you mean 'num_sequences'\?$"):
        generate(None, num_sequencs=3, sampler=None)


def test_a_typed_function_that_takes_any_name_still_does():
    assert typed(lambda size=0, **rest: (size, rest))(size=1, other=2) == (1, {"other": 2})
