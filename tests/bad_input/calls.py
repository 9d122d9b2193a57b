"""Entry points that take values from Python, and texts."""

from __future__ import annotations

import dataclasses
import re
from functools import partial
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
from hypothesis import strategies as st

import dials_jax as dj
from dials_jax.caching.parse import parse_cache
from dials_jax.cli.bench import parse_policy
from dials_jax.config import from_dict, to_dict
from dials_jax.config.choices import parse_choice
from dials_jax.config_files import open_config
from dials_jax.evaluation.task import SamplerConfig
from tests.bad_input.run import EntryPoint
from tests.bad_input.values import Case, alien_values, edited_json, odd_texts, odd_values
from tests.bad_input.world import SETTINGS, TRAINING

OBJECTS = (
    *SETTINGS, dj.Confidence(8), dj.Dream(8), dj.Ancestral(8, 8), dj.Autoregressive(8),
    dj.BlockDiffusion(8, 4), dj.EarlySkip(), dj.Schedule((("H", 4),)),
)  # fmt: skip
PROMPT, MASKED, ONE = [[3, 4]], [[3, 18]], dj.Confidence(1)
# Not prompts of the model's 19 tokens.
NO_IDS = ([[1.5]], [["a"]], [[-1]], [[19]], [[10**30]], "text", 3, [[True]], [3], [[[3]]], None, [])


@st.composite
def changed_field(draw):
    """A dataclass of settings, a field and a value for it."""
    settings = draw(st.sampled_from(OBJECTS))
    name = draw(st.sampled_from([f.name for f in dataclasses.fields(settings)]))
    wrong = draw(st.booleans())
    return Case((settings, name, draw(alien_values if wrong else odd_values)), wrong)


@st.composite
def stored_settings(draw):
    settings = draw(st.sampled_from(SETTINGS))
    case = draw(edited_json(to_dict(settings), typed=True))
    return Case((type(settings), case.value), case.wrong)


@st.composite
def override(draw):
    name = draw(
        st.sampled_from(
            ["seed", "optimizer.num_steps", "data.num_items", "model", "", ".", "seed.x"]
        )
        | st.text(max_size=6)
    )
    wrong = name not in {f.name for f in dataclasses.fields(TRAINING)} and name[-1:] not in "ms"
    value = draw(alien_values) if draw(st.booleans()) else draw(odd_values)
    return Case({name: value}, wrong)


def schedule_text():
    pieces = st.sampled_from([*"LH,0123456789 -+", "L2", "H750", ",", "٣", "\n", "999999999999"])
    right = re.compile(r"\s*[A-Za-z]0*[1-9][0-9]*\s*(,\s*[A-Za-z]0*[1-9][0-9]*\s*)*", re.ASCII)
    texts = st.lists(pieces, max_size=8).map("".join) | odd_texts
    return texts.map(lambda text: Case(text, right.fullmatch(text) is None))


def text_entries() -> list[EntryPoint]:
    cache = re.compile(r"none|prefix|dual|es-\d{1,9}-\d{1,9}", re.ASCII)
    caches = odd_texts | st.sampled_from(["es-64-4", "es--1-4", "ES-1-1", "dual-", "es-1e3-4"])
    caches = caches.map(lambda x: Case(x, not cache.fullmatch(x)))
    samplers = odd_texts | st.builds(
        "{}({}={})".format,
        st.sampled_from(["Confidence", "Dream", "Ancestral", "object", "eval", "Autoregressive"]),
        st.sampled_from(["gen_length", "steps", "temperature", "threshold", "x", "*", "__class__"]),
        st.sampled_from(["1", "-1", "'x'", "None", "10**30", "1e999", "{1: 2}", "open('/x')", ""]),
    )
    policies = odd_texts | st.sampled_from(
        ["static=²", "random=9" + "9" * 5000, "full=1", "static=+"]
    )
    either = partial(st.builds, Case, wrong=st.just(False))
    choose = partial(parse_choice, classes=get_args(SamplerConfig), flag="--sampler")
    return [
        EntryPoint("schedules", schedule_text(), dj.Schedule.parse),
        EntryPoint("caches", caches, parse_cache, 0.5),
        EntryPoint("samplers as text", either(samplers), choose, 0.7),
        EntryPoint("policies as text", either(policies), parse_policy, 0.5),
    ]  # fmt: skip


def calls(world: SimpleNamespace) -> dict[str, tuple[Any, dict[str, Any], dict[str, tuple]]]:
    """Public functions with arguments that fit, and values that do not, by argument.

    Of arguments without values of their own, those that are of no type do not fit.
    """
    model, folder = world.model, str(world.folder)
    ids = {"prompts": NO_IDS}
    pair = dict.fromkeys(("prompt_ids", "answer_ids"), ([1.5], ["a"], [-1], [19], 3, "x", [True]))
    no_paths = (3, None, "", "/none/such", b"x", [], "a" * 5000, "~nobody/x", "gs://b/x", "a\0b")
    path = {"path": no_paths}
    places = (3, None, "", "a" * 5000, "gs://b/x", "/proc/x")
    to = {"workdir": places}
    sampling = dict.fromkeys(("sampler", "policy", "cache", "schedule"), ("x", 3, [], dj))
    text = {"prompts": (3, None, [3], [[]], [[{}]], [[{"role": 3}]], {"a": 1}, ["\ud800"])}
    models = {"model": (None, "x", 3, {}, {"H": 3}, [model], object)}
    number = {"num_samples": (0, -1, 3, "x"), "batch_size": (0, -1, "x"), "cfg_scale": ("x", True)}
    noisy = np.array([[3, 18]])
    return {
        "generate": (dj.generate, {"model": model, "prompts": PROMPT, "sampler": ONE, "valid": None,
            "policy": None, "cache": None, "schedule": None, "key": None, "fill_to": 1,
            "executor": "auto", "num_sequences": None},
            ids | sampling | models | {"key": (3, "x"), "fill_to": (0, -1, "x", True),
            "executor": ("x", 3), "valid": ("x", [[1, 2, 3]]), "num_sequences": (0, -1, "x", 3)}),
        "infill": (dj.infill, {"model": model, "sequences": MASKED},
            {"sequences": (*NO_IDS, [[3, 4]])} | models),
        "generate_text": (dj.generate_text, {"model": model, "prompts": "+1", "max_new_tokens": 1,
            "tokenizer": folder}, text | models | {"max_new_tokens": (0, -1, "x", 100, 2**31)}),
        "replay": (dj.replay, {"model": model, "prompts": "+1", "tokenizer": folder, "seed": 0},
            text | models | {"seed": (-1, "x", 2**32), "compare": ("x", 3)}),
        "log_likelihood": (dj.log_likelihood, {"model": model, "prompt_ids": [3],
            "answer_ids": [4]}, pair | number | models),
        "confidence_log_likelihood": (dj.confidence_log_likelihood, {"model": model,
            "prompt_ids": [3], "answer_ids": [4]}, pair | models | {"append_eos": ("x", 3)}),
        "estimate_log_likelihood": (dj.estimate_log_likelihood, {"model": model, "tokens": [3, 4],
            "noisy": noisy, "p_mask": np.ones((1, 2)), "prompt_len": 1},
            models | {"tokens": ("x", [19, 3], [1.5, 2]), "noisy": ("x", [[19, 3]], [[3]]),
            "prompt_len": (-1, 3, "x"), "p_mask": ("x", [[0.0, 0.0]], [[2.0, -1.0]])}),
        "load": (dj.load, {"path": folder}, path | {"dtype": ("x", "int8", 3),
            "mesh": ("x", 3), "layout": ("x", 3), "weights": ("x", 3)}),
        "load_router": (dj.load_router, {"path": folder + "/router", "model": model},
            path | models | {"threshold": ("x", (0.5,), 2**70), "votes": ("x", 3),
            "execution_ratio": (0.5, "x", -1)}),
        "load_tokenizer": (dj.load_tokenizer, {"path": folder}, path),
        "load_results": (dj.load_results, {"path": folder}, path),
        "export_model": (dj.export_model, {"model": model, "folder": folder + "/new"},
            {"folder": places, "model": no_paths, "dtype": ("x", "int8", 3),
             "max_shard_size": ("x", "-5GB", "0GB", "1e999GB", 5, "GB", "9" * 5000 + "GB")}),
        "sweep": (dj.sweep, {"config": "demo/sweep", "workdir": folder + "/s"},
            {**to, "config": (3, None, "none", "demo/model", [], {}),
            "overrides": ("x", 3, {"x": 1})}),
        "train": (dj.train, {"config": "demo/model", "workdir": folder + "/t"},
            {**to, "config": (3, None, "none", "demo/sweep", [], {}),
            "overrides": ("x", 3, {"x": 1})}),
        "Schedule.sandwich": (dj.Schedule.sandwich, {"steps": 4, "light_steps": 2},
            {"steps": (0, -1, "x", 10**8), "light_steps": (-1, 5, 1.5, "x"),
            "light": ("", "LL", 3)}),
        "Schedule.coarse": (dj.Schedule.coarse, {"num_segments": 2, "chosen": (0,), "steps": 4},
            {"num_segments": (0, 3, "x"), "chosen": ((2,), (-1,), "x", 0, None), "steps": (0, 5)}),
        "Static": (dj.Static, {"layers": (1,)},
            {"layers": (3, "x", [1.5], [True], None, {1: 2})}),
        "Random": (dj.Random, {"num_skipped": 1}, {"num_skipped": (-1, "x", 0.5, True, [], 2**40)}),
        "Routed": (dj.Routed, {"router": {}, "threshold": 0.5},
            {"threshold": ("x", (2.0,), "0.5"), "router": ()}),
    }  # fmt: skip


# Of no argument's type, also where arrays and paths may stand.
ANYWHERE = (object(), b"x", 1j, float("nan"), 10**400, "\ud800", len, slice(2))


@st.composite
def wrong_call(draw, known: dict):
    """A call with one argument that does not fit."""
    name = draw(st.sampled_from(sorted(known)))
    _, right, wrong = known[name]
    argument = draw(st.sampled_from(sorted(x for x in right | wrong if wrong.get(x, 1))))
    own = st.sampled_from(wrong.get(argument, ANYWHERE))
    # JAX builds policies around objects of any class while it takes trees apart.
    others = own if name in ("Random", "Routed") else st.sampled_from(ANYWHERE)
    value = draw(own | others)
    return Case((name, argument, value), True)


def _replace(value: tuple) -> None:
    settings, name, new = value
    hash(dataclasses.replace(settings, **{name: new}))


def call_entries(world: SimpleNamespace) -> list[EntryPoint]:
    known = calls(world)

    def call(value):
        name, argument, new = value
        function, right, _ = known[name]
        function(**(right | {argument: new}))

    return [
        EntryPoint("public functions", wrong_call(known), call, 3.0),
        EntryPoint("fields of settings", changed_field(), _replace, 3.0),
        EntryPoint("settings from JSON", stored_settings(), lambda x: from_dict(*x), 2.0),
        EntryPoint("overrides", override(), lambda x: open_config(TRAINING, type(TRAINING), x)),
        *text_entries(),
    ]
