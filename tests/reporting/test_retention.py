"""Retention of several models side by side, on results with made-up numbers."""

import csv
import json

import numpy as np
import pytest

from dials_jax.cli.retention import retention_command
from dials_jax.errors import InputError
from dials_jax.reporting import retention
from dials_jax.reporting.publish import draw_figures
from dials_jax.reporting.retention import choice_figures, retention_report, retention_rows
from dials_jax.statistics import paired_ratio, paired_test
from tests.reporting.sweep_results import make_results, make_run

LAYERS = [5, 7, 9, 3]


def sweep_of(path, both=True):
    """Full, k = 1 to 4 without neighbours and, with `both`, with them."""
    results = make_results(tasks=("sums", "piqa"), kinds=("full", "static"))
    results["model"]["path"] = path
    for run in list(results["runs"]):
        policy, task = run["policy"], run["task"]
        if policy["kind"] == "full":
            continue
        policy["layers"] = LAYERS[: policy["num_skipped"]]
        run["identical"] = {name: float(i % 2) for i, name in enumerate(run["items"])}
        run["kl"] = {name: 0.1 * i for i, name in enumerate(list(run["items"])[:5])}
        if both:
            label = f"{policy['label']} adjacent"
            other = make_run(task, policy | {"label": label})
            results["runs"].append(other | {"policy": policy | {"label": label, "adjacent": True}})
    results["static_choice"] = {
        "sums": {
            "similarities": [0.9, 0.8],
            "shares": {"static k=1": [0.0, 1.0], "static k=2": [0.25, 0.75]},
        }
    }
    return results


@pytest.fixture(scope="module")
def sweeps():
    return {"llada": sweep_of("LLaDA"), "qwen2": sweep_of("Qwen2", both=False)}


@pytest.fixture
def workdirs(sweeps, tmp_path):
    for name, results in sweeps.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(results))
    return [str(tmp_path / name) for name in sweeps]


def items_of(results, task, label):
    (run,) = (x for x in results["runs"] if (x["task"], x["policy"]["label"]) == (task, label))
    return run["items"]


def test_rows_have_retention_and_the_test_between_the_kinds(sweeps):
    rows = retention_rows(sweeps)
    assert len(rows) == 2 * (1 + 2 * 4) + 2 * (1 + 4)
    for one in rows:
        results, row = sweeps[one.model], one.row
        full = items_of(results, row.task, "full")
        own = items_of(results, row.task, row.policy)
        if row.kind == "full":
            assert (one.num_skipped, one.layers_out, row.retention) == (0, 0, None)
            continue
        found = (row.retention, row.retention_low, row.retention_high)
        assert found == paired_ratio(own, full)
        ours, base = np.array(list(own.values())), np.array(list(full.values()))
        assert row.retention == pytest.approx(ours.mean() / base.mean())
        assert one.layers_out == pytest.approx(one.num_skipped / 12)
        if one.model == "qwen2":
            assert one.p_kinds is None
        else:
            kinds = [
                items_of(results, row.task, f"static k={one.num_skipped}{end}")
                for end in (" adjacent", "")
            ]
            assert one.p_kinds == paired_test(*kinds).p_value


def test_tables_have_the_papers_forms(sweeps):
    tables = retention_report(sweeps).tables
    side_by_side, kinds, details = tables.values()
    assert side_by_side.header == ("layers skipped", "llada", "qwen2")
    labels = [line[0] for line in side_by_side.lines]
    assert labels[:3] == ["sums, 0 (full)", "sums, 1", "sums, 2"] and len(labels) == 2 * 5
    rows = {(x.model, x.row.task, x.row.policy): x.row for x in retention_rows(sweeps)}
    full, own = rows["llada", "sums", "full"], rows["llada", "sums", "static k=1"]
    assert side_by_side.lines[0][1] == f"100.0 ({full.value:.2f})"
    cell = f"{100 * own.retention:.1f} [{100 * own.retention_low:.1f}, "
    assert side_by_side.lines[1][1].startswith(cell)
    assert kinds.header == ("layers skipped", "not allowed", "allowed", "p")
    assert [line[0] for line in kinds.lines[:2]] == ["sums, llada, k=1", "sums, llada, k=2"]
    assert kinds.lines[0][1].startswith(cell) and len(kinds.lines) == 2 * 4
    allowed = rows["llada", "sums", "static k=1 adjacent"]
    assert kinds.lines[0][2].startswith(f"{100 * allowed.retention:.1f} [")
    of_own = next(line for line in details.lines if line[0] == "sums, llada: static k=1")
    values = dict(zip(details.header, of_own, strict=True))
    assert values["layers"] == "5" and values["layers out, %"] == "8.33"
    assert values["identical, %"].startswith("50.0 [") and values["KL"].startswith("0.2000 ±")


def test_the_command_writes_tables_and_figures(workdirs, tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(retention, "retention_curves", lambda **data: fake(drawn, data))
    monkeypatch.setattr(retention, "choice_bars", lambda **data: fake(drawn, data))
    out = tmp_path / "report"
    retention_command([*workdirs, "--out", str(out)])
    shown = capsys.readouterr().out
    assert "Retention, %" in shown and f"report: {out / 'report.html'}" in shown
    curves, _, choices = drawn
    assert curves["title"] == "sums"
    assert list(curves["models"]) == ["llada", "llada, neighbours allowed", "qwen2"]
    assert curves["models"]["llada"].num_skipped == [1, 2, 3, 4]
    shares = choices["shares"]["llada, sums, k=2"]
    assert list(shares) == ["neighbours not allowed"]  # no column for a rule that none used
    np.testing.assert_array_equal(shares["neighbours not allowed"], [0.25, 0.75])
    with (out / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["model"] for row in rows} == {"llada", "qwen2"} and rows[0]["retention"] == ""
    assert float(rows[1]["layers_out"]) == pytest.approx(1 / 12)
    retention_command([*workdirs, "--out", str(out)])  # its own folder may be written again


def fake(drawn, data):
    """Stands for a plot: an empty image."""
    path = data.pop("path")
    drawn.append(data)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"")
    return path


def test_figures_are_drawn(sweeps, drawn, tmp_path):
    report = retention_report(sweeps)
    files = draw_figures(report.figures, tmp_path)
    assert [path.stem for path in files] == ["retention_sums", "retention_piqa", "chosen_layers"]
    assert [figure.axes[0].get_title() for figure in drawn[:2]] == ["sums", "piqa"]
    heights = [bar.get_height() for bar in drawn[2].axes[0].patches]
    assert heights == [25, 75]
    assert choice_figures({"": {"static_choice": {}}}) == []


def test_what_has_no_retention_is_one_line(workdirs, tmp_path):
    without = make_results(tasks=("sums",), kinds=("full", "routed"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "results.json").write_text(json.dumps(without))
    with pytest.raises(InputError, match="other has no static layers beside a full model"):
        retention_command([*workdirs, str(tmp_path / "other")])
    with pytest.raises(InputError, match="a workdir is given twice"):
        retention_command([workdirs[0], workdirs[0]])
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "report.html").write_text("mine")
    with pytest.raises(InputError, match=r"report.html was not made by a run of this folder"):
        retention_command([*workdirs, "--out", str(taken)])
