"""The code of a sampler of one's own is a setting that a sweep depends on."""

import subprocess
import sys

import dials_jax as dj
from dials_jax.evaluation.own_code import code_facts

SOURCE = """
import dataclasses, dials_jax as dj

@dataclasses.dataclass(frozen=True)
class Mine(dj.Confidence):
    scale: float = 2.0
    known = 1, 2

    def propose(self, cfg, logits, keys):
        if "x" in {"x", "y", "z"}:
            return super().propose(cfg, self.scaled(logits), keys)

    @staticmethod
    def scaled(logits):
        return logits * 2.0
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
    assert digest(SOURCE.replace("* 2.0", "* 3.0")) != known
    assert digest(SOURCE.replace("1, 2", "1, 3")) != known
    assert digest(SOURCE.replace("logits * 2.0", "2.0 - logits")) != known
    assert digest("# a comment\n\n" + SOURCE) == known


def test_it_is_the_same_in_another_process():
    script = f"from tests.evaluation.test_own_code import *\nprint(digest(SOURCE))\n{SOURCE}"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.stdout.strip() == str(digest(SOURCE)), found.stderr
