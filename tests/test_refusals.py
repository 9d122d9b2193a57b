"""Of each kind of fault that malformed inputs found, the right behaviour."""

import json
import math
import types

import pytest

import dials_jax as dj
from dials_jax.cli.bench import parse_policy
from dials_jax.config import RouterConfig, from_dict
from dials_jax.config.typed import as_list
from dials_jax.config_files import load_config
from dials_jax.errors import InputError
from dials_jax.export import _read_size
from dials_jax.files import local_path
from dials_jax.reporting.results import SweepResults
from dials_jax.skipping.routed import Routed

DIGITS = "9" * 5000  # Python makes no number of them

FACTS = {
    "router": {}, "num_layers": 2, "d_model": 16, "backbone_fingerprint": "x", "skip_weight": 1.0,
    "digests": {},
}  # fmt: skip


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: parse_policy(f"random={DIGITS}"), "give numbers"),
        (lambda: _read_size(f"{DIGITS}GB"), "is no size"),
        (lambda: local_path(math.nan, "workdir"), "workdir is a float and no path"),
        (lambda: local_path("a\rb\x85\0", "workdir"), "workdir=a b .* is no path"),
        (lambda: as_list(3), "3 is no list"),
        (lambda: from_dict(RouterConfig, {3: 4}), "unknown field 3"),
        (lambda: dj.replay({"H": 3}, ["x"]), "model=3 is no model"),
        (lambda: Routed({}, (0.5,)).check_threshold(2), "one per layer"),
        (lambda: SweepResults({"runs": [{"task": 3}]}, "x").table, "results.json is damaged"),
    ],
)
def test_it_is_refused_in_one_line(call, message):
    with pytest.raises(InputError, match=message) as error:
        call()
    assert len(str(error.value).splitlines()) == 1


def test_an_exception_that_cannot_be_printed_is_named(tmp_path):
    text = "class Odd(BaseException):\n    def __str__(self):\n        1 / 0\nraise Odd\n"
    (tmp_path / "c.py").write_text(text)
    with pytest.raises(InputError, match="line 4: Odd: without a message"):
        load_config(str(tmp_path / "c.py"), types.SimpleNamespace)


def test_a_loss_that_is_no_number_is_not_shown(tmp_path):
    lines = '{"step": 1, "loss": "x"}', '{"step": 2, "loss": 1.0}', '{"step": 3, "loss": null}'
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert repr(dj.load_results(tmp_path)).endswith("step 3, loss 1.000 to 1.000)")


@pytest.mark.usefixtures("untyped")
def test_a_model_that_is_none_has_no_router(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**FACTS, "format": "dials_jax router"}))
    with pytest.raises(InputError, match="model=3 is no model"):
        dj.load_router(tmp_path, 3)
