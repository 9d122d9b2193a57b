import csv
import html
import json
import re

import numpy as np
import pytest

from dials_jax.errors import InputError
from dials_jax.reporting import sweep_report
from dials_jax.reporting.figure import COLORS, kind_color
from dials_jax.reporting.sweep_report import write_report
from dials_jax.reporting.sweep_table import WIDTH, compute_sweep_rows, format_table
from tests.reporting.pages import HOSTILE, read_page
from tests.reporting.sweep_results import make_results


def test_the_report_holds_every_file_and_is_self_contained(tmp_path):
    results = make_results(tasks=("sums", "text"))
    write_report(results, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8")) == results
    page = read_page(tmp_path)
    images = sorted(path.read_bytes() for path in (tmp_path / "plots").glob("*.png"))
    assert sorted(page.images) == images and len(images) == 5  # trade-off, and two per task
    assert "script" not in page.tags and "link" not in page.tags
    for fact in ("25,165,824", results["environment"]["command"], "data 1, fsdp 1", "McNemar"):
        assert fact in page.visible


def test_csv_html_and_terminal_show_the_same_rows(tmp_path):
    rows = write_report(make_results(tasks=("sums",)), tmp_path)
    with (tmp_path / "results.csv").open(encoding="utf-8") as file:
        records = list(csv.DictReader(file))
    visible, table = read_page(tmp_path).visible, format_table(rows)
    assert len(records) == len(rows)
    for record, row in zip(records, rows, strict=True):
        assert float(record["value"]) == row.value
        assert record["p_value"] == ("" if row.p_value is None else str(row.p_value))
        cell = f"{row.value:.4f} ±{row.stderr:.4f}"
        assert cell in visible and re.search(rf"{re.escape(row.policy)} +{re.escape(cell)}", table)


def test_figures_hold_the_shares_of_each_policy():
    results = make_results(tasks=("piqa", "text"), kinds=("full", "static", "routed"))
    rows = compute_sweep_rows(results)
    report = sweep_report.sweep_report(results, rows)
    data = {figure.name: figure.data for figure in report.figures}

    accuracy, nelbo = data["tradeoff"]["panels"]
    assert (accuracy.lower_is_better, nelbo.lower_is_better) == (False, True)
    assert [p.value for p in accuracy.points + nelbo.points] == [row.value for row in rows]
    assert [p.label for p in nelbo.points[1:]] == [
        *(f"k={k}" for k in (1, 2, 3, 4)),
        *("λ=0.3", "λ=1", "λ=3"),
    ]
    labels, shares = data["layers_piqa"]["labels"], data["layers_piqa"]["shares"]
    assert labels[2] == "static k=2" and np.flatnonzero(shares[2] == 0).tolist() == [5, 7]
    # Layers and bins weigh the sequences that ran: the mean over both is the share of layers run.
    assert np.allclose(shares[2].mean(), 10 / 12)
    lines = data["mask_ratio_piqa"]["lines"]
    assert [line.kind for line in lines] == ["static"] * 4 + ["routed"] * 3
    assert np.isnan(lines[1].shares[:2]).all() and np.allclose(lines[1].shares[2:], 10 / 12)
    assert np.all(np.diff(lines[-1].shares[2:]) > 0)


def test_a_policy_of_any_kind_is_shown(tmp_path):
    results = make_results(tasks=("text",))
    policy = results["runs"][-1]["policy"]
    policy["kind"], policy["label"] = "early exit", "exit at 8"
    del policy["lambda"]
    write_report(results, tmp_path)
    visible = read_page(tmp_path).visible
    assert "exit at 8" in visible
    color = kind_color("early exit")
    assert color not in COLORS.values() and color == kind_color("early exit")
    assert f"--kind: {color}" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_every_text_of_the_results_is_escaped(tmp_path):
    results = make_results(tasks=("sums",), kinds=("full",))
    results["model"] = {"path": HOSTILE.replace("/", ""), HOSTILE: HOSTILE}
    results["environment"] = {"command": HOSTILE, "mesh": {HOSTILE: 1}}
    run = results["runs"][0]
    run["task"], run["policy"]["label"] = HOSTILE, HOSTILE
    run["examples"] = [
        dict.fromkeys(("prompt", "output", "reference"), HOSTILE) | {"correct": True}
    ]
    write_report(results, tmp_path)
    assert len(list((tmp_path / "plots").glob("*.png"))) == 2  # a / in a task makes no folder
    page = read_page(tmp_path)
    assert "script" not in page.tags
    assert page.visible.count(HOSTILE) >= 10
    assert html.escape(HOSTILE) in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["full", "static", "routed"])
def test_a_sweep_of_one_run_has_a_report(tmp_path, kind):
    results = make_results(tasks=("text",), kinds=(kind,))
    del results["runs"][1:]
    assert len(write_report(results, tmp_path)) == 1
    assert "text" in read_page(tmp_path).visible


def test_one_item_is_enough(tmp_path):
    results = make_results(tasks=("text",))
    for run in results["runs"]:
        run["items"] = {"text-0": run["items"]["text-0"]}
    rows = write_report(results, tmp_path)
    assert "nan" not in format_table(rows)


def test_a_sweep_that_has_not_begun_has_an_empty_table(tmp_path):
    assert write_report(make_results(tasks=()), tmp_path) == []
    assert "policy" in read_page(tmp_path).visible


def test_results_are_kept_when_they_cannot_be_compared(tmp_path):
    results = make_results(tasks=("sums",))
    results["runs"][3]["items"].popitem()
    with pytest.raises(InputError, match="static k=3"):
        write_report(results, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8")) == results


def test_the_terminal_table_is_aligned_and_fits():
    results = make_results()
    results["runs"][1]["policy"]["label"] = "a router " * 20
    results["runs"][1]["flops"]["seconds"] = 123456.7
    for run in results["runs"]:
        run["cache"] = "es-64-4" if run["task"] == "sums" else "none"
    lines = format_table(compute_sweep_rows(results)).splitlines()
    cells = [line for line in lines if line.startswith("  ")]
    assert {len(line) for line in cells} == {WIDTH}
    assert all(len(line) <= WIDTH for line in lines)
    assert len(cells) == 1 + len(results["runs"])
    assert [line for line in lines if line not in cells] == [
        "sums (exact_match, cache es-64-4)",
        "piqa (choice)",
        "text (nelbo)",
    ]


CONFIDENCE = {
    "sampler": "confidence", "gen_length": 256, "block_length": 32, "steps": 256,
    "temperature": 0.2, "cfg_scale": 0.0, "remasking": "low_confidence", "threshold": None,
    "stop_at_eos": False, "cache": "dual", "until": ["Q:", "\n\n"],
}  # fmt: skip
DREAM = {
    "sampler": "dream", "max_new_tokens": 64, "steps": 32, "alg": "entropy", "temperature": 0.1,
    "top_p": 0.95, "top_k": None, "cache": "none", "until": [],
}  # fmt: skip


@pytest.mark.parametrize(
    "generation, columns, words",
    [
        (
            CONFIDENCE,
            {"temperature": "0.2", "steps": "256", "num_dropped": "6"},
            "sampler confidence, gen_length 256, block_length 32, cfg_scale 0.0, "
            "remasking low_confidence, "
            "temperature 0.2, 256 steps, cache dual, all steps; text up to end of text or 'Q:' or "
            "'\\n\\n', 6 of 126 items left out: too long",
        ),
        (
            CONFIDENCE | {"threshold": 0.0, "stop_at_eos": True, "until": []},
            {"temperature": "0.2", "steps": ""},
            "threshold 0.0, temperature 0.2, cache dual, sequence ends at end of text; text up to "
            "end of text, 6 of 126",
        ),
        (
            DREAM,
            {"sampler": "dream, max_new_tokens 64, alg entropy, top_p 0.95", "steps": "32"},
            "sampler dream, max_new_tokens 64, alg entropy, top_p 0.95, temperature 0.1, 32 steps, "
            "cache none, all steps; text up to end of text, 6 of 126 items left out",
        ),
    ],
)
def test_report_and_csv_say_how_texts_are_made_and_how_many_items_are_left_out(
    generation, columns, words, tmp_path, monkeypatch
):
    monkeypatch.setattr(sweep_report, "_figures", lambda *args: [])
    results = make_results(tasks=("sums",), kinds=("full",))
    results["runs"][0] |= {"generation": generation, "cache": generation["cache"], "num_dropped": 6}
    table = format_table(write_report(results, tmp_path))
    assert words in " ".join(table.split()) and "120 of 126" in table
    assert words in read_page(tmp_path).visible
    with (tmp_path / "results.csv").open(encoding="utf-8") as file:
        (record,) = csv.DictReader(file)
    assert columns.items() <= record.items()


def test_results_without_these_facts_are_still_shown():
    (row,) = compute_sweep_rows(make_results(tasks=("sums",), kinds=("full",)))
    assert (row.sampler, row.temperature, row.steps, row.stop, row.num_dropped) == (None,) * 5
    assert "sums (exact_match)\n" in format_table([row])


def test_a_small_p_is_not_shown_as_zero():
    results = make_results(tasks=("text",), kinds=("full", "static"))
    for run in results["runs"][1:]:
        run["items"] = {key: score + 1 for key, score in results["runs"][0]["items"].items()}
    assert format_table(compute_sweep_rows(results)).count("<0.001") == 4
