"""Samplers and policies of one's own in a sweep: their code is a setting like any other."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import dials_jax as dj
from dials_jax.config import ArithmeticData, EvalConfig, EvalTask
from dials_jax.errors import InputError
from dials_jax.evaluation.own_code import code_facts

SOURCE = """
import dataclasses, functools, jax, dials_jax as dj

SHARE = 0.25

def helped(x, times=3):
    return x * SHARE * times

@dataclasses.dataclass(frozen=True)
class Mine(dj.Confidence):
    scale: float = 2.0
    known = 1, 2

    def propose(self, cfg, logits, keys):
        if "x" in {"x", "y", "z"}:
            return super().propose(cfg, self.scaled(logits), keys)

    @staticmethod
    def scaled(logits):
        return helped(logits * 2.0)

    @functools.partial(jax.jit, static_argnums=0)
    def compiled(self, x):
        return x - 7

    @functools.cached_property
    def cached(self):
        return 9

    odd = (len, object())
"""


def digest(source):
    names = {"__name__": "mine"}
    exec(source, names)
    return code_facts(sampler=names["Mine"](8), cache=dj.DualCache(), policy=None)


def test_only_classes_of_ones_own_have_one():
    assert code_facts(sampler=dj.Confidence(8), cache=None) == {}
    assert list(digest(SOURCE)) == ["code of sampler"]


def test_another_instruction_or_constant_is_other_code_and_a_comment_is_not():
    known = digest(SOURCE)
    for old, new in [
        ("* 2.0", "* 3.0"), ("1, 2", "1, 3"), ("logits * 2.0", "2.0 - logits"), ("- 7", "- 8"),
        ("return 9", "return 8"), ("SHARE = 0.25", "SHARE = 0.5"), ("times=3", "times=4"),
        ("x * SHARE", "x + SHARE"),
    ]:  # fmt: skip
        assert digest(SOURCE.replace(old, new)) != known, old
    assert digest("# a comment\n\n" + SOURCE) == known
    assert digest(SOURCE + "\nscaled = 5\n") == known  # no method reads this global


def test_it_is_the_same_in_another_process():
    script = f"from tests.evaluation.test_own_code import *\nprint(digest(SOURCE))\n{SOURCE}"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.stdout.strip() == str(digest(SOURCE)), found.stderr


# --------------------------------------------------------------------------------------- sweeps


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SkipOdd:
    """Skips odd layers of sequences that have more than so many masked tokens."""

    masked: int
    name = "odd"
    uses_keys = False

    def prepare(self, num_layers, denoising):
        return jnp.arange(num_layers) % 2 == 1

    def gate(self, prepared, h, denoising):
        return ~(prepared & (jnp.sum(denoising.masked, axis=1) > self.masked))


@pytest.fixture
def sweep(arithmetic_model, tmp_path, draw_only):
    draw_only("tradeoff")

    def run(sampler=None, **policies):
        task = EvalTask(
            name="sums", metric="exact_match", data=ArithmeticData(), limit=4, sampler=sampler
        )
        cfg = EvalConfig(
            model=str(arithmetic_model), tasks=(task,), num_static=(), num_random=(1,), batch_size=4
        )
        return dj.sweep(cfg, tmp_path / "sweep", policies=policies)

    return run


def test_policies_of_ones_own_are_scored_beside_the_others(sweep, capsys):
    results = sweep(**{"odd, early": SkipOdd(2), "all odd": SkipOdd(-1)})
    assert [row.policy for row in results.rows] == ["full", "random k=1", "all odd", "odd, early"]
    rows = {row.policy: row for row in results.rows}
    assert rows["all odd"].layers_run == 0.5 < rows["odd, early"].layers_run < 1
    assert {row.kind for row in results.rows} == {"full", "random", "odd"}
    capsys.readouterr()
    again = sweep(**{"all odd": SkipOdd(-1)})
    assert "sums, " not in capsys.readouterr().out  # nothing is scored again
    assert len(again.rows) == 4  # what other calls scored stays
    found = sweep(**{"all odd": SkipOdd(0)}).rows  # another policy under this label
    assert (
        len(found) == 5 and len({row.policy for row in found if "all odd (ver" in row.policy}) == 2
    )


def test_a_policy_of_the_library_may_be_given_too(sweep):
    results = sweep(two=dj.Random(2))
    assert [(row.policy, row.kind) for row in results.rows][2] == ("two", "own")
    assert results.row("two").layers_run == 0.5


@pytest.mark.parametrize(
    "policies, message",
    [
        ({"full": dj.Random(1)}, "'full' is a policy of the sweep; rename yours"),
        ({"mine": None}, "'mine' is None; the full model is there already"),
        ({"mine": SkipOdd}, "is no policy; give None, or one as"),
        ({"a": SkipOdd(1), "b": SkipOdd(1)}, "'b' and 'a' are one policy; remove one"),
    ],
)
def test_other_policies_are_refused(sweep, untyped, policies, message):
    with pytest.raises(InputError, match=message):
        sweep(**policies)


def test_a_sampler_whose_code_changed_is_another_setting(sweep):
    names = []
    for source in (SOURCE, SOURCE, SOURCE.replace("* 2.0", "* 3.0")):
        defined = {"__name__": "mine"}
        exec(source, defined)
        names.append({row.task for row in sweep(defined["Mine"](2, steps=1)).rows})
    assert names[0] == names[1] == {"sums"}
    assert len(names[2]) == 2 and any("code of sampler" in name for name in names[2])
