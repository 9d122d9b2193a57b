"""The command that compares rows of sweeps, on results with made-up numbers."""

import csv
import json
from copy import deepcopy

import numpy as np
import pytest

from dials_jax.cli.compare import compare_command as compare
from dials_jax.errors import InputError
from dials_jax.reporting.comparison import compare_all, rows_by_items
from dials_jax.statistics import paired_test
from tests.reporting.sweep_results import make_results

KINDS = ("full", "routed")


@pytest.fixture
def stored(tmp_path):
    """Stores results as the sweep of a workdir."""

    def store(name, results):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / name / "results.json").write_text(json.dumps(results))
        return str(tmp_path / name)

    return store


@pytest.fixture
def results():
    found = make_results(tasks=("sums",), kinds=KINDS)
    found["rules"], found["items"] = {"sums": 2}, {"sums": "abc"}
    for run in found["runs"]:
        run["seed"] = 0
    return found


def another_seed(results, seed=1):
    """The same policies under another seed: a few items come out otherwise."""
    found = deepcopy(results)
    for run in found["runs"]:
        run["seed"] = seed
        for name in list(run["items"])[: 4 * seed]:
            run["items"][name] = 1 - run["items"][name]
    return found


def test_every_pair_is_tested_on_its_items(stored, results, tmp_path, capsys):
    found = compare([stored("a", results), "--out", str(tmp_path / "out")])
    runs = {run["policy"]["label"]: run["items"] for run in results["runs"]}
    assert len(found) == 4 * 3 / 2 and len(runs) == 4
    for pair in found:
        expected = paired_test(runs[pair.row], runs[pair.other])
        assert (pair.difference, pair.p_value) == (expected.difference, expected.p_value)
        assert pair.p_value <= pair.p_holm <= 1 and pair.low < pair.difference < pair.high
        assert (pair.test, pair.covers, pair.num_items) == ("McNemar", "items", 120)
    with (tmp_path / "out" / "comparison.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["row"] for row in rows] == [pair.row for pair in found]
    assert float(rows[0]["difference"]) == found[0].difference
    shown = capsys.readouterr().out.splitlines()
    matrix = {line.split()[0]: line for line in shown if line[:1].isdigit()}
    assert list(matrix) == ["1", "2", "3", "4"]
    assert (
        f"{found[0].difference:+.4f}" in matrix["2"]
        and f"{found[0].difference:+.4f}" not in (matrix["1"])
    )


def test_holms_correction_is_shown_on_request(stored, capsys):
    folder = stored("a", make_results(tasks=("sums",)))
    found = compare([folder])
    plain = capsys.readouterr().out
    compare([folder, "--holm"])
    corrected = capsys.readouterr().out
    middle = next(pair for pair in found if 0.001 < pair.p_value and pair.p_holm < 1)
    assert f" {middle.p_value:.3f}" in plain and f" {middle.p_holm:.3f}" in corrected
    assert "not corrected" in plain and "Holm" in corrected


def test_seeds_of_several_workdirs_make_one_row(stored, results):
    folders = [stored(str(seed), another_seed(results, seed)) for seed in range(3)]
    found = compare(folders)
    assert {pair.row for pair in found} | {pair.other for pair in found} == {
        run["policy"]["label"] for run in results["runs"]
    }
    for pair in found:
        assert (pair.covers, pair.test) == ("items and seeds", "paired t")
    means = {
        run["policy"]["label"]: np.mean([*run["items"].values()])
        for run in rows_by_items(
            [run for seed in range(3) for run in another_seed(results, seed)["runs"]], {}
        )["sums"]
    }
    assert found[0].difference == pytest.approx(means[found[0].row] - means[found[0].other])
    assert compare([*folders, stored("again", results)]) == found  # what two have counts once


def test_other_models_and_settings_are_named_by_their_workdirs(stored, results):
    other = another_seed(results)
    other["model"]["fingerprint"] = "another"
    found = compare([stored("x/a", results), stored("x/b", other)])
    assert len(found) == 8 * 7 / 2
    assert {found[0].other, found[-1].row} == {"a: full", "b: routed λ=3"}
    only = compare([stored("x/a", results), stored("x/b", other), "--only", "a: full", "b: full"])
    assert [(pair.row, pair.other) for pair in only] == [("b: full", "a: full")]


def test_one_data_set_under_two_settings_is_one_group():
    runs = make_results(tasks=("sums",), kinds=KINDS)["runs"]
    dual = [{**run, "task": "sums dual"} for run in runs]
    (group,) = rows_by_items([*runs, *dual], {}).values()
    pairs = compare_all("sums", group)
    same = [pair for pair in pairs if pair.row.removeprefix("sums dual: ") == pair.other[6:]]
    assert len(same) == 4 and all(pair.difference == 0 and pair.p_value == 1 for pair in same)
    other_rules = rows_by_items([*runs, *dual], {"sums": 2, "sums dual": 1})
    assert [len(rows) for rows in other_rules.values()] == [4, 4]


def drop_an_item(results):
    for run in results["runs"]:
        run["items"].popitem()


REFUSED = {
    "items": (drop_an_item, r"cannot be compared on 'sums': the items differ \(120 and 119"),
    "labels": (lambda r: r.update(items={"sums": "abd"}), "labels or references of the items"),
    "rules": (lambda r: r.update(rules={"sums": 1}), "the rules are of version 2 and 1"),
    "tasks": (
        lambda r: [run.update(task="piqa") for run in r["runs"]], "have no task in common",
    ),
    "damage": (lambda r: r["runs"][0].pop("flops"), r"b/results.json is damaged"),
    "a study": (lambda r: r.pop("runs"), "results.json is not of a sweep"),
    "nothing": (lambda r: r.update(runs=[]), "has no finished run"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_compared_is_named(name, stored, results):
    change, message = REFUSED[name]
    other = deepcopy(results)
    change(other)
    with pytest.raises(InputError, match=message) as error:
        compare([stored("a", results), stored("b", other)])
    assert "\n" not in str(error.value)


def test_wrong_arguments_are_one_line(stored, results, tmp_path):
    folder = stored("a", results)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "comparison.csv").write_text("mine")
    for arguments, message in {
        (str(tmp_path),): "has no results.json; give the --workdir of a sweep",
        (folder, folder): "given twice",
        (folder, "--hom"): "is no option of dials compare; did you mean .--holm.",
        (folder, "--only", "routed λ=2"): "no row 'routed λ=2'.*did you mean",
        (folder, "--only", "full"): "there is only one row",
        (folder, "--out", str(tmp_path / "out")): "comparison.csv was not made by a run",
    }.items():
        with pytest.raises(InputError, match=message) as error:
            compare(list(arguments))
        assert "\n" not in str(error.value)
    assert (tmp_path / "out" / "comparison.csv").read_text() == "mine"
