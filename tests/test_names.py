"""A public top-level name stands in one module: a search for it finds one thing."""

import ast
from collections import defaultdict

import pytest

from tests.test_imports import MODULES, ROOT

ALLOWED = {
    "log": "the logger of a module, as Python's documentation names it",
    "small": "configurations of earlier versions call it: models/llada.py and models/mdlm.py",
    # What every kind of published checkpoint has; convert/hugging_face.py describes them.
    "ARCHITECTURES": "a kind of checkpoint: the classes that its config.json may name",
    "TABLE": "a kind of checkpoint: its tensors and ours",
    "REQUIRED": "a kind of checkpoint: options with the one value that is implemented",
    "translate_config": "a kind of checkpoint: its config.json as a ModelConfig",
    "publish_config": "a kind of checkpoint: a ModelConfig as its config.json",
    "LAYOUT": "a kind of checkpoint: how it stores the tensors of its table",
}


def public_names(tree):
    """Functions, classes and constants that a module defines; type variables are no such thing."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            call = node.value.func if isinstance(node.value, ast.Call) else None
            if isinstance(call, ast.Name) and call.id == "TypeVar":
                continue
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            stored = [x for target in targets for x in ast.walk(target) if isinstance(x, ast.Name)]
            names = [x.id for x in stored if isinstance(x.ctx, ast.Store)]
        else:
            continue
        yield from (name for name in names if not name.startswith("_"))


@pytest.fixture(scope="module")
def modules_of():
    """The modules that define each name."""
    found = defaultdict(set)
    for path in MODULES:
        for name in public_names(ast.parse(path.read_text())):
            found[name].add(str(path.relative_to(ROOT)))
    return found


def test_a_public_name_stands_in_one_module(modules_of):
    twice = {name: sorted(files) for name, files in modules_of.items() if len(files) > 1}
    assert {name: files for name, files in twice.items() if name not in ALLOWED} == {}


def test_every_exception_is_needed(modules_of):
    assert {name for name in ALLOWED if len(modules_of[name]) < 2} == set()


def test_names_are_found_in_every_kind_of_definition():
    source = """
A, (B, _c) = 1, (2, 3)
D: int = 4
T = TypeVar("T")
A.field = 5
def f(): inner = 6
class G: attribute = 7
"""
    assert list(public_names(ast.parse(source))) == ["A", "B", "D", "f", "G"]
