"""The examples of docs/skipping.md run; links between pages lead somewhere."""

import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_examples_of_skipping_run(lively, routers):
    text = (ROOT / "docs/skipping.md").read_text(encoding="utf-8")
    prompts = np.random.default_rng(0).integers(2, 60, (2, 5))
    names = {"model": lively, "prompts": prompts, "routers": routers}
    for example in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S):
        exec(example, names)
    assert names["out"].gates.shape == (4, lively.num_layers, 2)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
