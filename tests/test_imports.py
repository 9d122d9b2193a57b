"""Imports point left: a module imports only from levels below its own, or from its own package."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEVELS = (
    {"errors", "progress", "stopping"},
    {"compiling"},
    {"buckets", "files", "meeting"},
    {"config"},
    {"config_files"},
    {"keys", "statistics", "trees"},
    {"digests"},
    {"sharding"},
    {"nn", "stored", "workdir"},
    {"diffusion", "mirror", "records"},
    {"models"},
    {"data"},
    {"skipping"},
    {"caching"},
    {"sampling"},
    {"convert", "estimates"},
    {"loading"},
    {"export"},
    {"reporting"},
    {"training"},
    {"evaluation"},
    {"text_sampler"},
    {"text"},
    {"answer_file", "bench", "watching"},
    {"studies"},
    {"pods"},
    {"commands"},
    {"cli"},
    {"compare"},
    {"reference"},  # the plain decoder for readers and tests: nothing imports it
)
LEVEL = {name: i for i, names in enumerate(LEVELS) for name in names}
OPTIONAL = {
    "aiohttp", "array_record", "datasets", "fsspec", "grain", "lm_eval", "math_verify",
    "matplotlib", "pyarrow", "scipy", "tensorboardX", "tensorflow_datasets", "tokenizers", "torch",
    "tqdm", "transformers", "tyro",
}  # fmt: skip
# Modules that are only imported where a package is used: they subclass its classes.
OF_A_PACKAGE = {"evaluation/lm_eval.py": {"lm_eval"}, "evaluation/harness_run.py": {"lm_eval"}}
MODULES = sorted((ROOT / "dials_jax").rglob("*.py"))


def imports(node, top_level_only=False):
    """Dotted names of what a syntax tree imports, `from a import b` as `a.b`."""
    nodes = node.body if top_level_only else ast.walk(node)
    for n in nodes:
        if isinstance(n, ast.Import):
            yield from (alias.name for alias in n.names)
        elif isinstance(n, ast.ImportFrom):
            assert n.level == 0, "relative import"
            yield from (f"{n.module}.{alias.name}" for alias in n.names)


def package_of(path):
    """`nn` for dials_jax/nn/stack.py, `trees` for dials_jax/trees.py."""
    return path.relative_to(ROOT / "dials_jax").with_suffix("").parts[0]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_left(path):
    package = package_of(path)
    if package == "__init__":
        return
    assert package in LEVEL, f"{package} has no level; add it to LEVELS"
    for name in imports(ast.parse(path.read_text())):
        top, *rest = name.split(".")
        if top != "dials_jax":
            continue
        if not rest:  # the package itself, for its version
            continue
        other = rest[0]
        assert other == package or LEVEL[other] < LEVEL[package], f"{package} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_optional_packages_are_imported_where_they_are_used(path):
    tree = ast.parse(path.read_text())
    top_level = {name.split(".")[0] for name in imports(tree, top_level_only=True)}
    own = OF_A_PACKAGE.get(path.relative_to(ROOT / "dials_jax").as_posix(), set())
    assert not (top_level & OPTIONAL) - own


def test_modules_of_an_optional_package_are_imported_where_it_is_used():
    names = {f"dials_jax.{p.removesuffix('.py').replace('/', '.')}" for p in OF_A_PACKAGE}
    for path in MODULES:
        if path.relative_to(ROOT / "dials_jax").as_posix() not in OF_A_PACKAGE:
            top_level = {
                name.rpartition(".")[0]
                for name in imports(ast.parse(path.read_text()), top_level_only=True)
            }
            assert not top_level & names, path


def test_every_package_of_the_table_exists():
    assert {package_of(path) for path in MODULES} - {"__init__"} == LEVEL.keys()


def test_no_import_hides_in_a_condition_at_the_top():
    """The test of optional packages would not see it. `if TYPE_CHECKING` never runs."""
    for path in MODULES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                continue
            if isinstance(node, ast.If | ast.Try | ast.With):
                assert not list(imports(node)), path
