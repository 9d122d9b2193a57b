"""Importance of steps, what it predicts of schedules, and searching less by it."""

import dataclasses

import numpy as np
import pytest

from dials_jax.config import ProposeStudy
from dials_jax.errors import InputError
from dials_jax.sampling.model_schedule import Schedule
from dials_jax.statistics import mean_interval
from dials_jax.studies import importance as importance_study
from dials_jax.studies.divergence import Divergence, divergences
from dials_jax.studies.study import run_study
from tests.studies.workdirs import records_of, results_of

pytestmark = pytest.mark.usefixtures("quick_plots")


def test_importance_by_time_is_kept_as_it_comes(importance, study_models, tmp_path, monkeypatch):
    cfg, finished = importance
    with monkeypatch.context() as patch:
        times = []

        def stopping(*args, **kwargs):
            if len(times) == 1:
                raise KeyboardInterrupt
            times.append(args[3])
            return divergences(*args, **kwargs)

        patch.setattr(importance_study, "divergences", stopping)
        with pytest.raises(KeyboardInterrupt):
            run_study(cfg, tmp_path)
    run_study(cfg, tmp_path)
    assert (tmp_path / "runs.jsonl").read_text() == (finished / "runs.jsonl").read_text()
    curves = results_of(tmp_path)["curves"]
    assert set(curves) == {"loss", "gap", "kl", "relative_kl"}
    assert set(curves["relative_kl"]) == {"L"} and set(curves["kl"]) == {"L", "H2"}
    records = records_of(tmp_path)
    kl = [record["models"]["L"]["kl"] for record in records]
    np.testing.assert_allclose(
        curves["kl"]["L"]["value"], [np.mean([x for x in row if x is not None]) for row in kl]
    )


def test_predictions_are_integrals_over_the_times_of_light_steps(importance):
    cfg, workdir = importance
    records = {record["time"]: record["models"]["L"] for record in records_of(workdir)}
    sandwich, middle, whole, second = (
        {r["quantity"]: r for r in results_of(workdir)["predicted"] if r["schedule"] == schedule}
        for schedule in cfg.schedules
    )
    for quantity, name in {"gap": "loss_gap", "kl": "kl"}.items():
        low, mid, high = (np.array(records[t][name], float) for t in cfg.times)  # t = 1/6, 1/2, 5/6
        keep = np.isfinite(low + mid + high)
        low, mid, high = low[keep], mid[keep], high[keep]
        # Linear between the times, constant beyond: half a cell of each end, trapezoids between.
        total = (low + high) / 6 + (low + 2 * mid + high) / 6
        np.testing.assert_allclose(whole[quantity]["value"], total.mean(), rtol=1e-3)
        np.testing.assert_allclose(
            second[quantity]["value"], (low / 6 + (low + mid) / 6).mean(), rtol=1e-3
        )
        both = sandwich[quantity]["value"] + middle[quantity]["value"]
        np.testing.assert_allclose(both, total.mean(), rtol=1e-3)
        assert sandwich[quantity]["difference"] == 0
        found = mean_interval(total)
        np.testing.assert_allclose([whole[quantity][x] for x in ("low", "high")], found, rtol=1e-3)


def test_too_few_sequences_to_predict_with_are_named():
    seen = np.array([[0.1, np.nan], [np.nan, 0.2]])  # no sequence was masked at both times
    found = [Divergence(values, values) for values in seen]
    with pytest.raises(
        InputError, match="fewer than two sequences have a masked token at every time"
    ):
        importance_study.predict_losses([Schedule.parse("L4")], (0.25, 0.75), {"L": found})


def test_models_of_one_depth_are_told_apart(importance):
    cfg, _ = importance
    models = (("H", "runs/a"), ("H2", "runs/b"), ("L", "runs/short"), ("M", "runs/long"))
    cfg = dataclasses.replace(cfg, models=models, schedules=())
    depths = {"H": 12, "H2": 12, "L": 4, "M": 4}
    labels = [importance_study._label(x, cfg, depths) for x in ("H", "H2", "L", "M")]
    assert labels == [
        "H: 12 blocks", "H2: 12 blocks, another seed", "L: 4 blocks, short", "M: 4 blocks, long",
    ]  # fmt: skip


def test_proposals_replay_the_search(searched, importance, tmp_path):
    cfg = ProposeStudy(
        search=str(searched), importance=str(importance[1]), budgets=(1, 6), num_repeats=3
    )
    run_study(cfg, tmp_path)
    results = results_of(tmp_path)
    assert {"chance", "additive model", "importance by loss", "importance by KL + additive"} <= set(
        results["regret"]
    )
    for found in results["regret"].values():
        assert found[1] == {"mean": 0, "low": 0, "high": 0}  # all six were tried
    best = results_of(searched)["schedules"][0]["schedule"]
    chosen = {row["schedule"] for row in results["choices"] if row["tried"] == 6}
    assert chosen == {best}
