"""The examples of docs/skipping.md and docs/sampling.md run; links between pages lead somewhere."""

import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def run_examples(page, **names):
    text = (ROOT / page).read_text(encoding="utf-8")
    names["prompts"] = np.random.default_rng(0).integers(2, 60, (2, 5))
    for example in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S):
        exec(example, names)
    return names


def test_the_examples_of_skipping_run(lively, routers):
    names = run_examples("docs/skipping.md", model=lively, routers=routers)
    assert names["out"].gates.shape == (4, lively.num_layers, 2)


def test_the_examples_of_sampling_run(lively):
    names = run_examples("docs/sampling.md", model=lively)
    out, tasks = names["out"], names["tasks"]
    assert out.passes.max() == out.nfe <= 32 and (out.tokens_per_pass >= 1).all()
    assert [task.sampler.threshold for task in tasks] == [0.5, 0.7, 0.9]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
