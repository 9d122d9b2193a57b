import numpy as np
import pytest

from dials_jax.errors import InputError
from dials_jax.reporting.seeds import pool_seeds, seed_interval
from dials_jax.reporting.sweep_rows import compute_sweep_rows, value_interval
from dials_jax.reporting.sweep_table import format_table
from dials_jax.statistics import mean_interval
from tests.reporting.sweep_results import make_results


def seeds_of_one_policy(num_seeds=3):
    """The runs of a task whose routed policies with lambda 1 are `num_seeds` seeds."""
    results = make_results(tasks=("sums",))
    (routed,) = [run for run in results["runs"] if run["policy"]["label"] == "routed λ=1"]
    items = list(routed["items"])
    for seed in range(1, num_seeds):
        flipped = {**routed["items"], items[seed]: 1 - routed["items"][items[seed]]}
        costs = {**routed["flops"], "seconds": routed["flops"]["seconds"] + 3 * seed}
        results["runs"].append({**routed, "seed": seed, "items": flipped, "flops": costs})
    return results


def test_a_pooled_run_has_the_means_of_its_seeds():
    results = seeds_of_one_policy()
    runs = [run for run in results["runs"] if run["policy"]["label"] == "routed λ=1"]
    pooled = pool_seeds(results["runs"])
    assert len(pooled) == len(results["runs"]) - 2
    (one,) = [run for run in pooled if "seed_means" in run]
    assert one["items"] == {
        name: pytest.approx(np.mean([run["items"][name] for run in runs])) for name in one["items"]
    }
    assert one["seed_means"] == [np.mean(list(run["items"].values())) for run in runs]
    assert one["flops"]["seconds"] == pytest.approx(runs[0]["flops"]["seconds"] + 3)
    assert one["flops"]["layers_run"] == pytest.approx(runs[0]["flops"]["layers_run"])
    assert np.sum(one["execution"]["rows"]) == 3 * np.sum(runs[0]["execution"]["rows"])


def test_repeated_times_of_any_seed_count():
    """Those under the conditions that were measured last; some seeds may have none."""
    results = seeds_of_one_policy(4)
    runs = [run for run in results["runs"] if run["policy"]["label"] == "routed λ=1"]
    for run, device, seconds in zip(runs[1:], "abb", ([1.0], [2.0, 3.0], [4.0]), strict=True):
        run["timing"] = {"measured": {"device": device}, "seconds": seconds}
    (one,) = [run for run in pool_seeds(results["runs"]) if "seed_means" in run]
    assert one["timing"] == {"measured": {"device": "b"}, "seconds": [2.0, 3.0, 4.0]}


def test_the_interval_covers_items_and_seeds():
    (one,) = [run for run in pool_seeds(seeds_of_one_policy()["runs"]) if "seed_means" in run]
    low, high = seed_interval(one)
    of_items = mean_interval(list(one["items"].values()))
    assert low < of_items[0] < of_items[1] < high
    alike = {**one, "seed_means": [0.5, 0.5, 0.5]}
    assert seed_interval(alike) == pytest.approx(of_items)
    apart = {**one, "seed_means": [0.0, 1.0]}  # two seeds say little: the interval is Cauchy's
    assert seed_interval(apart)[1] - seed_interval(apart)[0] > 10
    assert value_interval(apart | {"metric": "choice"}) == (0, 1)  # of an accuracy
    assert value_interval(apart | {"metric": "nelbo"}) == seed_interval(apart)


def test_a_row_says_how_many_seeds_it_has():
    rows = compute_sweep_rows(seeds_of_one_policy())
    (row,) = [row for row in rows if row.num_seeds > 1]
    assert row.policy == "routed λ=1" and row.num_seeds == 3
    header, *lines = format_table(rows).splitlines()
    assert "seeds" in header
    assert f"3 ±{row.seed_stdev:.4f}" in next(line for line in lines if "routed λ=1 " in line)
    assert "seeds" not in format_table(compute_sweep_rows(make_results())).splitlines()[0]


def test_seeds_of_other_items_are_refused():
    results = seeds_of_one_policy()
    results["runs"][-1]["items"].popitem()
    with pytest.raises(InputError, match="'routed λ=1': its seeds have other items"):
        compute_sweep_rows(results)
