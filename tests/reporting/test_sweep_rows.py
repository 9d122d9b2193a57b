import dataclasses

import numpy as np
import pytest

from dials_jax.errors import InputError
from dials_jax.reporting.sweep_rows import compute_sweep_rows
from dials_jax.statistics import paired_test
from tests.reporting.sweep_results import make_results


def test_a_row_compares_with_the_full_run_of_its_own_task():
    results = make_results()
    rows = compute_sweep_rows(results)
    assert len(rows) == len(results["runs"])
    for row, run in zip(rows, results["runs"], strict=True):
        full = next(r for r in results["runs"] if r["task"] == row.task)
        assert row.policy == run["policy"]["label"]
        assert row.low < row.value < row.high
        assert row.speedup == pytest.approx(full["flops"]["seconds"] / row.seconds)
        if row.kind == "full":
            assert row.speedup == 1 and row.difference is row.p_value is None
        else:
            paired = paired_test(run["items"], full["items"])
            assert (row.difference, row.p_value) == (paired.difference, paired.p_value)
            assert row.difference == pytest.approx(
                row.value - np.mean(list(full["items"].values()))
            )


def test_without_a_full_run_nothing_is_compared():
    for row in compute_sweep_rows(make_results(kinds=("static", "routed"))):
        compared = (row.difference, row.difference_stderr, row.p_value, row.speedup)
        assert compared == (None,) * 4
        assert None not in dataclasses.astuple(row)[:8]


def test_rows_of_a_task_stay_together_when_runs_are_interleaved():
    results = make_results()
    results["runs"].sort(key=lambda run: run["policy"]["label"])
    tasks = [row.task for row in compute_sweep_rows(results)]
    assert tasks == sorted(tasks, key=tasks.index)


def test_an_error_names_the_task_and_the_policy():
    results = make_results(tasks=("sums",))
    results["runs"][2]["items"].popitem()
    with pytest.raises(InputError, match="task 'sums', policy 'static k=2': 1 items"):
        compute_sweep_rows(results)
    results["runs"][0]["items"].clear()
    with pytest.raises(InputError, match="policy 'full': no scores"):
        compute_sweep_rows(results)


def test_an_accuracy_must_be_scored_zero_or_one():
    results = make_results(tasks=("sums",), kinds=("full",))
    results["runs"][0]["items"]["sums-0"] = 0.5
    with pytest.raises(InputError, match="'exact_match': scores must be 0 or 1"):
        compute_sweep_rows(results)
