"""The page of rules for routers, from results made up so that its sentences are known."""

import json

import numpy as np
import pytest

from benchmarks import command, routers_page
from benchmarks.routers import FITTED, split_documents
from benchmarks.routers_page import Rows, comparisons, page

ITEMS = 40
SETTINGS = {
    "layers": 4, "width": 8, "length": 32, "batch": 8, "model_steps": 1, "router_steps": 1,
    "lambdas": [1.0], "seeds": [0, 1], "ratios": [0.75, 0.5], "skipped": [1], "items": ITEMS,
    "calibration": 16, "samples": 4,
}  # fmt: skip
# Nats above the full model at any ratio; "hard, one tau" cannot skip a half.
PRICES = dict(zip(FITTED, (0.10, 0.08, 0.10, 0.06, 0.12, 0.11), strict=True))


@pytest.fixture(scope="module")
def results():
    rng = np.random.default_rng(0)
    difficulty = rng.normal(4.0, 1.0, ITEMS)

    def row(rule, price, share, **facts):
        items = difficulty + price + rng.normal(0, 0.01, ITEMS)
        return {
            "rule": rule, **facts, "nelbo": float(items.mean()), "layers_run": share,
            "flops_share": share, "seconds": 1.0, "items": items.tolist(),
            "item_layers": rng.normal(share, 0.01, ITEMS).tolist(),
        }  # fmt: skip

    rows = [row("full", 0.0, 1.0), row("static", 0.2, 0.75, k=1, layers=[2])]
    rows.append(row("random", 0.5, 0.75, k=1))
    for seed in (0, 1):
        where = {"lambda": 1.0, "seed": seed}
        rows += [row(rule, 0.01, 0.97, **where) for rule in ("paper", "soft", "annealed")]
        for rule, price in PRICES.items():
            for ratio in SETTINGS["ratios"]:
                reached = 0.9 if rule == "hard, one tau" and ratio == 0.5 else ratio
                rows.append(row(rule, price, reached, ratio=ratio, **where))
    log = [{"validation/execution_sampled": 0.6, "validation/loss": 1.0}]
    names = [f"router-{name}-1-{seed}" for name in ("paper", "annealed") for seed in (0, 1)]
    machine = {"device": "a GPU", "date": "today", "jax": "1", "command": "python -m it"}
    training = dict.fromkeys(names, log)
    return {"machine": machine, "settings": SETTINGS, "rows": rows, "training": training}


def test_comparisons_find_the_differences_and_leave_out_what_was_not_reached(results):
    found = comparisons(Rows(results), "hard, one tau")
    assert {one["ratio"] for one in found} == {0.75} and len(found) == len(FITTED) - 1
    by_rule = {one["rule"]: one for one in found}
    for rule, one in by_rule.items():
        expected = PRICES[rule] - PRICES["hard, one tau"]
        assert one["paired"].difference == pytest.approx(expected, abs=0.006)
        assert one["at_equal"][0] == pytest.approx(expected, abs=0.01)
    assert by_rule["soft, tau per layer"]["p"] < 0.01
    assert by_rule["soft, tau per layer"]["better"] == 2


def test_the_page_says_what_was_found(results):
    text = page(results, "Soft votes.")
    assert "**Answer.** Soft votes." in text and "on a GPU" not in text
    assert "| hard, one tau | 1 |" in text and "out of reach (0.900)" in text
    line = "- *soft, tau per layer* against *hard, one tau*: better in 1, worse in 0 of 1"
    assert line in text
    assert "the best of 6 routed cases (*soft, tau per layer*, λ=1) less static k=1 is -0.1" in text
    assert text.count("| --- |") >= 5


def test_the_page_is_written(results, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "keep_programs", lambda: None)
    (tmp_path / "routers.json").write_text(json.dumps(results))
    arguments = [str(tmp_path / "routers.json"), str(tmp_path / "page.md")]
    assert routers_page.main(arguments) == 0
    assert (tmp_path / "page.md").read_text().startswith("# Rules for routers")
    (tmp_path / "other.json").write_text("{}")
    assert routers_page.main([str(tmp_path / "other.json"), arguments[1]]) == 2
    assert "is not of benchmarks.routers" in capsys.readouterr().err


def test_test_texts_are_no_calibration_texts(tmp_path):
    lines = [json.dumps({"text": str(i)}) + "\n" for i in range(5)]
    (tmp_path / "all.jsonl").write_text("".join(lines))
    files = split_documents(tmp_path / "all.jsonl", tmp_path / "work")
    found = {name: file.read_text().splitlines(True) for name, file in files.items()}
    assert found == {"test": lines[::2], "calibration": lines[1::2]}
