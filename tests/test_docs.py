"""The examples of pages of docs/ run; links between pages lead somewhere."""

import re
from pathlib import Path

import numpy as np
import pytest

import dials_jax
import dials_jax.config
from dials_jax.config import RouterConfig, TextData
from dials_jax.data.tokenizer import character_tokenizer
from dials_jax.data.tokenizer_training import train_tokenizer
from dials_jax.files import write_json
from dials_jax.skipping.storage import save_router
from tests.conftest import MASK
from tests.reporting.sweep_results import make_results

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def write_text(folder):
    """Text of 61 characters, which with the special tokens are all ids of the small model."""
    characters = "".join(map(chr, range(ord("A"), ord("A") + MASK - 2)))
    character_tokenizer(characters).save(folder)
    (folder / "text.txt").write_text(characters * 8)
    paths = (str(folder / "text.txt"),)
    return TextData(paths=paths, tokenizer=str(folder), length=8, cache=str(folder))


def run_examples(page, **names):
    text = (ROOT / page).read_text(encoding="utf-8")
    names["prompts"] = np.random.default_rng(0).integers(2, 60, (2, 5))
    for example in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S):
        exec(example, names)
    return names


def test_the_examples_of_skipping_run(lively, routers, tmp_path):
    save_router(tmp_path / "router", routers, RouterConfig(d_hidden=8), lively, skip_weight=1.0)
    names = run_examples(
        "docs/skipping.md", model=lively, routers=routers, router_folder=tmp_path / "router",
        held_out=write_text(tmp_path / "text"),
    )  # fmt: skip
    assert names["out"].gates.shape == (4, lively.num_layers, 2)


def test_the_examples_of_sampling_run(lively):
    names = run_examples("docs/sampling.md", model=lively)
    out, tasks = names["out"], names["tasks"]
    assert out.passes.max() == out.nfe <= 32 and (out.tokens_per_pass >= 1).all()
    assert [task.sampler.threshold for task in tasks] == [0.5, 0.7, 0.9]


def test_the_examples_of_generation_run(arithmetic_model, capsys, untyped):
    names = run_examples("docs/generate.md", folder=arithmetic_model / "model")
    out = names["out"]
    assert (out.tokens.shape, out.gates.shape) == ((2, 11), (8, 4, 2))
    assert "(2, 11) (8, 4, 2) (2, 8)" in capsys.readouterr().out


def test_the_examples_of_export_run(arithmetic_model, tmp_path, capsys):
    run_examples("docs/export.md", dj=dials_jax, folder=arithmetic_model, out=tmp_path / "out")
    assert capsys.readouterr().out == "True\n"


def test_the_examples_of_data_run(tmp_path):
    (tmp_path / "a.txt").write_text("a text to train on, a text to train on")
    train_tokenizer([str(tmp_path / "a.txt")], 270, tmp_path / "tokenizer")
    names = run_examples("docs/data.md", tokenizer=tmp_path / "tokenizer", **vars(dials_jax.config))
    assert names["model"].mask_id == 2


def test_the_examples_of_the_first_pages_run(arithmetic_model, routers, tmp_path, monkeypatch):
    model = dials_jax.load(arithmetic_model)
    folder = tmp_path / "runs/demo/router-high"
    save_router(folder, routers, RouterConfig(d_hidden=8), model, skip_weight=1.0)
    (tmp_path / "runs/demo/model").symlink_to(arithmetic_model)
    monkeypatch.chdir(tmp_path)
    run_examples("docs/install.md")
    names = run_examples("docs/quickstart.md")
    assert len(names["answers"]) == 2
    write_json(tmp_path / "sweep/results.json", make_results(("sums", "text")))
    run_examples("docs/reports.md", sweep_workdir=tmp_path / "sweep")
    assert Path("tradeoff.png").is_file()


def test_the_examples_of_representation_run(lively, tmp_path):
    names = run_examples("docs/representation.md", model=lively, workdir=tmp_path)
    assert names["profile"].layer_cosine.mean.shape == (4, lively.num_layers, 8)
    assert (tmp_path / "profiles" / "A.npz").is_file()


def test_the_examples_of_python_run(lively, tmp_path, monkeypatch, capsys):
    sweep, training = tmp_path / "sweep", tmp_path / "training"
    write_json(sweep / "results.json", make_results(("sums", "text")))
    training.mkdir()
    (training / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 1.5}\n')
    monkeypatch.chdir(tmp_path)
    run_examples(
        "docs/python.md", model=lively, sweep_workdir=sweep, training_workdir=training
    )  # fmt: skip
    assert Path("tradeoff.png").is_file()
    assert "step 2, loss 2.500 to 1.500" in capsys.readouterr().out


def test_the_site_has_every_page_and_every_public_name():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")]
    assert not [page for page in pages if f": {page}\n" not in nav], "add them to mkdocs.yml"
    names = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    homes = [f"dials_jax.{module}.{name}" for name, module in dials_jax._HOMES.items()]
    assert not [home for home in homes if f"::: {home}\n" not in names], "add them to docs/api.md"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
