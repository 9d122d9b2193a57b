"""The examples of pages of docs/ run; links between pages lead somewhere."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import dials_jax
import dials_jax.config
from dials_jax.config import RouterConfig
from dials_jax.data.tokenizer_training import train_tokenizer
from dials_jax.skipping.storage import save_router
from tests.reporting.sweep_results import make_results

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def run_examples(page, **names):
    text = (ROOT / page).read_text(encoding="utf-8")
    names["prompts"] = np.random.default_rng(0).integers(2, 60, (2, 5))
    for example in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S):
        exec(example, names)
    return names


@pytest.fixture
def demo(arithmetic_model, routers, tmp_path, monkeypatch):
    """A folder in which runs/demo is what `make demo` leaves, in small."""
    router = tmp_path / "runs/demo/router-high"
    model = dials_jax.load(arithmetic_model)
    save_router(router, routers, RouterConfig(d_hidden=8), model, skip_weight=1.0)
    (router / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 1.5}\n')
    (tmp_path / "runs/demo/model").symlink_to(arithmetic_model)
    results = json.dumps(make_results(("sums", "text"))).replace('"sums"', '"arithmetic"')
    (tmp_path / "runs/demo/sweep").mkdir()
    (tmp_path / "runs/demo/sweep/results.json").write_text(results)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_examples_of_skipping_run(demo):
    names = run_examples("docs/skipping.md")
    model, prompts, policy = names["model"], names["prompts"], names["SkipEarly"](3)
    assert names["out"].gates.shape == (5, model.num_layers, 2)
    # Its gates are those of a sequence alone, whatever the batch pads.
    settings = {"sampler": names["sampler"], "policy": policy}
    alone = dials_jax.generate(model, [prompts[0][:2]], **settings).gates
    both = dials_jax.generate(model, [prompts[0][:2], prompts[1]], **settings).gates
    assert 0 < alone.mean() < 1
    np.testing.assert_array_equal(both[:, :, 0], alone[:, :, 0])


def test_the_examples_of_eight_bits_run(demo):
    names = run_examples("docs/eight_bits.md")
    assert names["model"].weights == "int8" and names["out"].tokens.shape == (2, 11)


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


def test_the_examples_of_the_first_pages_run(demo):
    run_examples("docs/install.md")
    names = run_examples("docs/quickstart.md")
    assert len(names["answers"]) == 2
    run_examples("docs/reports.md")
    assert Path("tradeoff.png").is_file()


def test_the_examples_of_representation_run(demo):
    names = run_examples("docs/representation.md")
    assert names["profile"].layer_cosine.mean.shape == (4, names["model"].num_layers, 8)
    assert Path("runs/profiles/profiles/A.npz").is_file()


def test_the_examples_of_python_run(demo, capsys):
    run_examples("docs/python.md")
    assert Path("tradeoff.png").is_file()
    assert "step 2, loss 2.500 to 1.500" in capsys.readouterr().out


def test_the_examples_of_own_code_run(demo):
    names = run_examples("docs/own_code.md")
    assert np.isfinite(float(names["loss"])) and names["out"].tokens.shape == (2, 13)
    assert not (names["out"].tokens == names["model"].config.mask_id).any()


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
