import csv
import html
import re

import numpy as np
import pytest

from dials_jax.errors import InputError
from dials_jax.files import read_json
from dials_jax.reporting import sweep_report
from dials_jax.reporting.figure import COLORS, kind_color
from dials_jax.reporting.publish import latex_text
from dials_jax.reporting.sweep_report import write_report
from dials_jax.reporting.sweep_rows import compute_sweep_rows
from dials_jax.reporting.sweep_settings import settings_html
from dials_jax.reporting.sweep_table import WIDTH, format_table, page_table
from tests.reporting.pages import HOSTILE, read_page
from tests.reporting.sweep_results import make_results


def test_the_report_holds_every_file_and_is_self_contained(tmp_path):
    results = make_results(tasks=("sums", "text"), kinds=("full", "routed"))
    write_report(results, tmp_path)
    assert read_json(tmp_path / "results.json") == results
    page = read_page(tmp_path)
    images = sorted(path.read_bytes() for path in (tmp_path / "plots").glob("*.png"))
    # Three trade-offs, one over tasks, and two per task, each as a vector graphic, too.
    assert sorted(page.images) == images and len(images) == 8
    assert len(list((tmp_path / "plots").glob("*.pdf"))) == 8
    assert "script" not in page.tags and "link" not in page.tags
    for fact in ("25,165,824", results["environment"]["command"], "data 1, fsdp 1", "McNemar"):
        assert fact in page.visible


def test_csv_html_and_terminal_show_the_same_rows(tmp_path, without_plots):
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


def test_a_policy_of_any_kind_is_shown(tmp_path, without_plots):
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
    # A / in a task makes no folder. Nothing is compared by seconds.
    assert len(list((tmp_path / "plots").glob("*.png"))) == 3
    page = read_page(tmp_path)
    assert "script" not in page.tags
    assert page.visible.count(HOSTILE) >= 12
    assert html.escape(HOSTILE) in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["full", "static", "routed"])
def test_a_sweep_of_one_run_has_a_report(tmp_path, kind):
    results = make_results(tasks=("text",), kinds=(kind,))
    del results["runs"][1:]
    assert len(write_report(results, tmp_path)) == 1
    assert "text" in read_page(tmp_path).visible


def test_one_item_is_enough(tmp_path):
    results = make_results(tasks=("text",), kinds=("full", "routed"))
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
    assert read_json(tmp_path / "results.json") == results


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
    generation, columns, words, tmp_path, without_plots
):
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


SETTINGS = {
    "name": "piqa", "metric": "choice", "num_samples": 128, "limit": 500, "cfg_scale": 0.0,
    "data": {"kind": "task", "paths": ["piqa.jsonl"], "prompt": "{goal}\n", "few_shot": ["x", 5],
             "target_delimiter": ""},
    "sampler": None, "choices": [], "bucket": 64,
}  # fmt: skip


@pytest.fixture
def described():
    """Results of all kinds of policies on multiple choice, with everything that they record."""
    results = make_results(tasks=("piqa",))
    results["config"] = {"model": "m", "tasks": [], "batch_size": 7, "mesh": {"tensor": 2}}
    results["model"]["trained"] = {"optimizer": {"num_steps": 2000}}
    results["commands"] = ["python eval.py --one  # today", "python eval.py --two  # tomorrow"]
    for run in results["runs"]:
        run["settings"] = SETTINGS
        run["also"] = {"accuracy_per_token": 0.625, "chance": 0.375}
        if run["policy"]["kind"] == "static":
            run["policy"]["layers"] = list(range(run["policy"]["num_skipped"]))
            run["calibration"] = "the first 5 prompts of its training data"
        if run["policy"]["kind"] == "routed":
            run["router"] = {"path": "runs/router", "threshold": 0.1}
            run["trained"] = {"objective": {"target_skip_rate": 0.5}}
    return results


def test_the_page_holds_every_setting(described, tmp_path, without_plots):
    write_report(described, tmp_path)
    visible = read_page(tmp_path).visible
    for text in (
        "batch_size", "mesh.tensor", "num_samples", "128", "cfg_scale0.0", "limit",
        "500", '"{goal}\\n"', '"x", 5',
        "skips layers 0, 1, 2 (from 0) at every step; chosen by Goel, Algorithm 1, on the first 5",
        "skips 2 random layers, drawn per sequence and step", "runs every layer",
        "lambda 0.3, path runs/router, threshold 0.1", "Training of runs/router",
        "objective.target_skip_rate", "Training of the model", "optimizer.num_steps", "2000",
        *described["commands"],
    ):  # fmt: skip
        assert text in visible, text
    assert "trained" not in visible
    assert 'data.target_delimiter""' in visible  # empty, and yet a setting


def test_the_page_names_all_seeds_and_each_task_once(described):
    runs = described["runs"]
    for run in runs:
        run["seed"] = 3
    other = [{**run, "task": "sums"} for run in runs if run["policy"]["kind"] == "full"]
    again = [{**run, "seed": 11} for run in [*runs, *other]]
    page = settings_html({**described, "runs": [*runs, *other, *again]})
    assert "<dt>seed</dt><dd>3, 11</dd>" in page
    assert "(piqa)" in page and "piqa, piqa" not in page


def test_accuracy_per_token_stands_beside_accuracy_and_chance_is_named(described, tmp_path):
    rows = compute_sweep_rows(described)
    figures = {f.name: f.data for f in sweep_report.sweep_report(described, rows).figures}
    assert figures["tradeoff"]["panels"][0].chance == 0.375
    table = page_table(rows)
    assert table.header[:3] == ("policy", "value", "per token") and table.lines[0][2] == "0.6250"
    assert "chance 0.3750, 128 samples per item" in table.headings[0][1]
    assert "per token" not in page_table(compute_sweep_rows(make_results(tasks=("sums",)))).header


def test_the_csv_holds_settings_as_numbers(described, tmp_path, without_plots):
    write_report(described, tmp_path)
    with (tmp_path / "results.csv").open(encoding="utf-8") as file:
        records = {record["policy"]: record for record in csv.DictReader(file)}
    numbers = ("value", "stderr", "low", "high", "layers_run", "model", "seconds", "speedup")
    for record in records.values():
        assert all(np.isfinite(float(record[name])) for name in numbers)
        assert (record["num_samples"], record["limit"], record["chance"]) == ("128", "500", "0.375")
    assert records["routed λ=0.3"]["lambda"] == "0.3" and records["full"]["lambda"] == ""
    assert records["static k=3"]["num_skipped"] == "3"
    assert records["static k=3"]["static_layers"] == "0 1 2"


def test_costs_are_compared_where_they_were_measured_alike(described):
    for run in described["runs"]:
        run["measured"] = [{"device": "H100" if run["policy"]["kind"] == "random" else "H200"}]
    rows = compute_sweep_rows(described)
    figures = {f.name: f.data for f in sweep_report.sweep_report(described, rows).figures}
    for name, cost in (("tradeoff", "layers_run"), ("tradeoff_flops", "flops_share")):
        points = figures[name]["panels"][0].points
        assert [point.cost for point in points] == [getattr(row, cost) for row in rows]
    points = figures["tradeoff_seconds"]["panels"][0].points
    assert {point.kind for point in points} == {"full", "static", "routed"}
    assert [point.cost for point in points] == [row.seconds for row in rows if row.kind != "random"]


@pytest.mark.parametrize("worse, chosen", [({}, "λ=3"), ({"3"}, "λ=1"), ({"0.3", "1", "3"}, "λ=1")])
def test_the_router_over_tasks_skips_most_without_a_loss(worse, chosen):
    """Without any such router it is the one that loses least."""
    results = make_results(tasks=("sums",), kinds=("full", "routed"))
    full, *routed = results["runs"]
    for run in routed:
        run["items"] = dict(full["items"])
        name = run["policy"]["label"].removeprefix("routed λ=")
        right = [item for item, score in full["items"].items() if score]
        lost = {"0.3": 3, "1": 1, "3": 2}[name] if name in worse else 0
        run["items"] |= dict.fromkeys(right[:lost], 0)
    rows = compute_sweep_rows(results)
    figures = {f.name: f.data for f in sweep_report.sweep_report(results, rows).figures}
    (task,) = figures["layers_by_task"]["tasks"]
    assert task.title == f"sums, {chosen}"
    (run,) = (run for run in routed if run["policy"]["label"] == f"routed {chosen}")
    expected = np.array(run["execution"]["executed"]) / run["execution"]["rows"][0]
    np.testing.assert_allclose(task.by_mask_ratio, expected)
    np.testing.assert_allclose(task.by_layer, expected.mean(axis=0))


def test_a_paper_includes_the_table_with_one_command(described, tmp_path, without_plots):
    described["runs"][0]["task"] = "100%_of_$ & #1"
    described["runs"] = described["runs"][:3]
    write_report(described, tmp_path)
    text = (tmp_path / "results.tex").read_text(encoding="utf-8")
    comment, *lines = text.splitlines()
    assert comment.startswith("%") and r"\input{results.tex}" in comment
    assert lines[0] == r"\begin{tabular}{lrrrrrrr}" and lines[-1] == r"\end{tabular}"
    assert [line for line in lines if "rule" in line] == [r"\toprule", r"\midrule", r"\bottomrule"]
    assert r"\multicolumn{8}{l}{100\%\_of\_\$ \& \#1} \\" in lines
    rows = [line for line in lines if line.endswith(r"\\") and "multicolumn" not in line]
    assert {line.count(" & ") for line in rows} == {7} and len(rows) == 1 + 3
    assert "static k=1" in rows[2] and r"$\pm$" in rows[2] and "±" not in text


def test_latex_takes_no_text_for_a_command():
    assert latex_text("a_b & {c}\\d 5% ~^") == (
        r"a\_b \& \{c\}\textbackslash{}d 5\% \textasciitilde{}\textasciicircum{}"
    )
    assert latex_text("routed λ=0.3, -0.01 +.5 e-5 <0.001") == (
        r"routed $\lambda$=0.3, $-$0.01 $+$.5 e-5 $<$0.001"
    )
