"""A wheel, built without a network and installed into an empty folder, is used in another one."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

import dials_jax
from dials_jax.config_files import shipped_configs
from dials_jax.convert.safetensors_reader import open_tensors
from tests.evaluation.harness_cases import make_model_folder

ROOT = Path(__file__).parents[1]
SETUPTOOLS = int(importlib.metadata.version("setuptools").split(".")[0])
pytestmark = pytest.mark.skipif(
    SETUPTOOLS < 77, reason="building needs setuptools>=77; pip install -e '.[dev]'"
)
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"]
OFFLINE = ["--no-index", "--no-deps"]

# One process for all commands: importing JAX takes longer than what they do.
USE = """
import json, sys
from pathlib import Path
import dials_jax
from dials_jax.cli.main import dials

assert Path(dials_jax.__file__).is_relative_to(sys.argv[1]), dials_jax.__file__
TINY = "--model.num-layers 2 --model.d-model 32 --model.num-heads 4 --model.num-kv-heads 4 "
TINY += "--model.head-dim 8 --model.d-ff 64 --batch-size 8 --data.num-items 64 "
TINY += "--optimizer.num-steps 2 --optimizer.warmup-steps 1"
dials(["train", "--config", "demo/model", "--workdir", "model", *TINY.split()])
dials(["generate", "model", "--prompt", "s12,3=", "--max-new-tokens", "4", "--out", "a.jsonl"])
sweep = "--model model --routers --num-static --num-random --batch-size 8 "
sweep += "--tasks.0.limit 8"
dials(["eval", "--config", "demo/sweep", "--workdir", "sweep", *sweep.split()])
dials(["convert", "published", "converted"])
dials(["export", "converted", "--out", "exported"])
"""


def build(source, folder):
    """Builds the wheel of a folder or an sdist, as pip does."""
    command = [*PIP, "wheel", "--no-build-isolation", *OFFLINE, "--wheel-dir", str(folder)]
    subprocess.run([*command, str(source)], check=True)
    [wheel] = folder.glob("*.whl")
    return wheel


def contents(wheel):
    with zipfile.ZipFile(wheel) as file:
        return {name: file.read(name) for name in file.namelist() if not name.endswith("RECORD")}


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """What a wheel is built from, without what earlier builds have left."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("dials_jax", "configs", "convert", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", *(["*"] if name == "tests" else []))
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
    return folder


@pytest.fixture(scope="module")
def wheel(clone, tmp_path_factory):
    return build(clone, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder that holds the wheel's files only; Python finds the rest in this environment."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([*PIP, "install", *OFFLINE, "--target", str(folder), str(wheel)], check=True)
    return folder


def test_a_wheel_holds_the_package_and_its_configurations(wheel):
    files = contents(wheel)
    tops = {name.split("/")[0] for name in files}
    assert tops == {"dials_jax", f"dials_jax-{dials_jax.__version__}.dist-info"}
    assert "dials_jax/py.typed" in files
    modules = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "dials_jax").rglob("*.py")
        if "configs" not in path.parts
    }
    configs = {f"dials_jax/configs/{name}.py" for name in shipped_configs()}
    assert {name for name in files if name.endswith(".py")} == modules | configs


def test_an_sdist_builds_the_same_wheel(clone, wheel, tmp_path):
    script = f"import setuptools.build_meta as b; b.build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", script], cwd=clone, check=True, capture_output=True)
    [sdist] = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as file:
        assert not any(member.issym() for member in file)
    assert contents(build(sdist, tmp_path / "again")) == contents(wheel)


def test_an_installed_wheel_works_in_another_folder(installed, tmp_path):
    make_model_folder("llada_tiny", tmp_path / "published")
    env = {**os.environ, "PYTHONPATH": str(installed)}
    command = installed / "bin" / "dials"
    shown = subprocess.run(
        [command, "--version"], env=env, cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert shown.stdout == f"dials_jax {dials_jax.__version__}\n"
    done = subprocess.run(
        [sys.executable, "-c", USE, str(installed)], env=env, cwd=tmp_path, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    [line] = (tmp_path / "a.jsonl").read_text().splitlines()
    assert json.loads(line)["prompt"] == "s12,3="
    assert json.loads((tmp_path / "sweep" / "results.json").read_text())["runs"]
    assert json.loads((tmp_path / "converted" / "config.json").read_text())["model"]
    exported = open_tensors(tmp_path / "exported")
    published = open_tensors(tmp_path / "published")
    assert exported.keys() == published.keys()
    for name, tensor in published.items():
        np.testing.assert_array_equal(exported[name], tensor)
