"""Whole studies of schedules on random models: what they write, and how they go on."""

import csv
import dataclasses
import json
import shutil
from math import comb

import jax
import numpy as np
import pytest

import dials_jax as dj
from dials_jax.commands import load_config, override
from dials_jax.config import EvalConfig, ProposeStudy, ScheduleStudy, SearchStudy, StudyConfig
from dials_jax.data.tokenizer import load_tokenizer
from dials_jax.errors import InputError
from dials_jax.evaluation.perplexity import perplexities, retokenise, score_samples
from dials_jax.files import read_json
from dials_jax.loading import load
from dials_jax.sampling.model_schedule import Schedule
from dials_jax.studies import samples, study
from dials_jax.studies import search as search
from dials_jax.studies.from_studies import coarse_schedules, read_harms, read_search
from dials_jax.studies.placements import Placements
from dials_jax.studies.study import run_study
from dials_jax.workdir import exclusive
from tests.studies.workdirs import LENGTH, STEPS, records_of, results_of

pytestmark = pytest.mark.usefixtures("quick_plots")


def values_of(workdir, schedule, *names):
    """What the records hold of each sample, or its perplexity."""
    found = [record for record in records_of(workdir) if record["schedule"] == schedule]
    columns = [np.concatenate([r[name] for r in found]) for name in names or ("nll", "weight")]
    return columns if names else np.exp(columns[0] / columns[1])


def test_given_schedules_are_compared_with_the_first(comparing, compared):
    rows = {row["schedule"]: row for row in results_of(compared)["schedules"]}
    assert tuple(rows) == comparing.schedules
    assert [round(row["saved_blocks"], 6) for row in rows.values()] == [0, 0.25, 0.5]
    assert rows["H8"]["saved_flops"] == 0 < rows["L8"]["saved_flops"] < 0.5
    assert rows["H8"]["difference"] == 0 and rows["H8"]["p_value"] == 1
    values, base = values_of(compared, "L8"), values_of(compared, "H8")
    assert len(values) == 5
    np.testing.assert_allclose(rows["L8"]["perplexity"], values.mean())
    np.testing.assert_allclose(rows["L8"]["difference"], (values - base).mean())
    with (compared / "results.csv").open(newline="") as file:
        assert [row["schedule"] for row in csv.DictReader(file)] == list(comparing.schedules)


def test_from_python_it_is_the_same_study(comparing, compared, tmp_path):
    shutil.copytree(compared, tmp_path / "copy")
    found = dj.study(comparing, tmp_path / "copy")
    assert found == dj.load_results(compared) and len(found.rows) == 3
    with pytest.raises(InputError, match="num_samples"):
        dj.study(comparing, tmp_path / "copy", {"num_samples": 3})
    with pytest.raises(InputError, match=r"of class ScheduleStudy.*in Python .* or dj\.study"):
        dj.sweep("mdlm/study_schedules", tmp_path / "other")


def test_entropy_is_held_equal(compared):
    row = {row["schedule"]: row for row in results_of(compared)["schedules"]}["L8"]
    nats = np.log(values_of(compared, "L8")) - np.log(values_of(compared, "H8"))
    entropy = values_of(compared, "L8", "entropy")[0] - values_of(compared, "H8", "entropy")[0]
    slope, at_zero = np.polyfit(entropy, nats, 1)
    assert slope != 0 and row["log_difference"] == pytest.approx(nats.mean())
    assert row["equal_entropy"] == pytest.approx(at_zero)
    assert row["log_difference_low"] < nats.mean() < row["log_difference_high"]
    assert row["equal_entropy_low"] < at_zero < row["equal_entropy_high"]


def test_intervals_that_two_samples_leave_open_are_null(comparing, tmp_path):
    run_study(dataclasses.replace(comparing, num_samples=2), tmp_path)
    results = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    row = results["schedules"][-1]
    assert row["log_difference_low"] < row["log_difference"] and row["equal_entropy_low"] is None
    with (tmp_path / "results.csv").open(newline="") as file:
        assert [row["equal_entropy_low"] for row in csv.DictReader(file)][-1] == ""


@pytest.fixture(scope="module")
def first_samples(study_models):
    """The first batch of all light steps."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), np.arange(3))
    return samples.generate(
        {"L": load(study_models / "L", layout="stacked")},
        sampler=samples.Ancestral(LENGTH, STEPS),
        schedule=Schedule.parse("L8"),
        key=keys,
        num_sequences=3,
    ).tokens


def test_samples_are_those_of_their_numbers_scored_as_they_are(
    compared, study_models, first_samples
):
    expected = perplexities(score_samples(load(study_models / "S"), first_samples, 3), "mean")
    np.testing.assert_allclose(values_of(compared, "L8")[:3], expected, rtol=1e-4)
    tokenizer = load_tokenizer(study_models / "L")
    assert results_of(compared)["examples"]["L8"] == tokenizer.decode(first_samples[0])


def test_samples_may_be_scored_as_text(comparing, study_models, first_samples, tmp_path):
    changes = {"schedules": ("L8",), "num_samples": 3, "retokenize": "always"}
    run_study(dataclasses.replace(comparing, **changes), tmp_path)
    tokenizer = load_tokenizer(study_models / "L")
    ids = retokenise(first_samples, tokenizer, tokenizer, 1, 1, comparing.score_length)
    assert ids.shape != first_samples.shape
    expected = perplexities(score_samples(load(study_models / "S"), ids, 3), "mean")
    np.testing.assert_allclose(values_of(tmp_path, "L8"), expected, rtol=1e-4)


def test_batches_do_not_matter(comparing, compared, tmp_path):
    run_study(dataclasses.replace(comparing, schedules=("L8",), batch_size=5), tmp_path)
    found, expected = (values_of(workdir, "L8") for workdir in (tmp_path, compared))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_a_scheduled_model_may_skip_layers(settings, study_models, tmp_path):
    heavy = str(study_models / "H")
    changes = {
        "models": (("H", heavy), ("S", heavy)),
        "static_layers": (("S", "1"),),
        "num_samples": 3,
    }
    run_study(ScheduleStudy(**(settings | changes), schedules=("H4,S4", "S8")), tmp_path)
    rows = {row["schedule"]: row for row in results_of(tmp_path)["schedules"]}
    assert round(rows["S8"]["saved_blocks"], 6) == 0.5  # of H's two blocks
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), np.arange(3))
    expected_tokens = samples.generate(
        load(heavy, layout="stacked"),
        sampler=samples.Ancestral(LENGTH, STEPS),
        policy=samples.Static((1,)),
        key=keys,
        num_sequences=3,
    ).tokens
    expected = perplexities(score_samples(load(study_models / "S"), expected_tokens, 3), "mean")
    np.testing.assert_allclose(values_of(tmp_path, "S8"), expected, rtol=1e-4)


def test_a_search_tries_every_schedule_once(searching, searched):
    tried = [r["schedule"] for r in records_of(searched) if r["first"] == 0]
    assert len(tried) == len(set(tried)) == comb(4, 2) == searching.num_schedules
    for text in tried:
        assert Schedule.parse(text).share("L") == 0.5
    results = results_of(searched)
    perplexity = [row["perplexity"] for row in results["schedules"]]
    assert perplexity == sorted(perplexity) and len(perplexity) == 6
    # The first is the baseline, and some of its steps are light.
    assert {row["saved_flops"] for row in results["schedules"]} == {None}
    _, values = read_search(searched)
    expected = search.segment_influence(Placements(4, 2).table, values)
    np.testing.assert_allclose(results["segments"]["influence"]["value"], expected.value)
    assert sum(results["segments"]["light_in_best"]) == 2 * 2


class Stop:
    """`generate`, counted; it stops the study before call `stop`."""

    def __init__(self, stop):
        self.stop, self.calls, self.generate = stop, 0, samples.generate

    def __call__(self, *args, **kwargs):
        if self.calls == self.stop:
            raise KeyboardInterrupt
        self.calls += 1
        return self.generate(*args, **kwargs)


def test_a_search_that_was_stopped_gives_the_same_file(searching, searched, tmp_path, monkeypatch):
    first = Stop(5)
    with monkeypatch.context() as patch:
        patch.setattr(samples, "generate", first)
        with pytest.raises(KeyboardInterrupt):
            run_study(searching, tmp_path)
    assert len(records_of(tmp_path)) == 5  # the third schedule is half done
    with (tmp_path / "runs.jsonl").open("a") as file:
        file.write('{"schedule": "H4,L')  # killed while writing
    second = Stop(None)
    monkeypatch.setattr(samples, "generate", second)
    run_study(searching, tmp_path)
    assert first.calls + second.calls == len(records_of(searched))
    assert records_of(tmp_path) == records_of(searched)


def test_an_odd_line_is_set_aside_and_only_its_batch_measured_again(
    searching, searched, tmp_path, monkeypatch, capsys
):
    workdir = shutil.copytree(searched, tmp_path / "search")
    lines = (workdir / "runs.jsonl").read_text().splitlines(keepends=True)
    lines[2] = lines[2].replace('"nll": [', '"nll": [1', 1)  # the first batch of a schedule
    (workdir / "runs.jsonl").write_text("".join(lines))
    (workdir / "results.json").write_text("{")  # written again from the records
    again = Stop(None)
    monkeypatch.setattr(samples, "generate", again)
    with pytest.raises(InputError, match=r"runs.jsonl, line 3 is damaged.*run that study again"):
        run_study(dataclasses.replace(searching, samples=str(workdir)), tmp_path / "other")
    run_study(searching, workdir)
    assert again.calls == 1
    assert "runs.jsonl, line 3 is damaged" in capsys.readouterr().err
    found = records_of(workdir)
    assert [*found[:2], found[-1], *found[2:-1]] == records_of(searched)
    new, old = (
        {row["schedule"]: row["perplexity"] for row in results_of(x)["schedules"]}
        for x in (workdir, searched)
    )
    assert new == old


def test_one_process_at_a_time(searching, tmp_path):
    with exclusive(tmp_path), pytest.raises(InputError, match="is in use by process"):
        run_study(searching, tmp_path)


@pytest.mark.parametrize("name", ["report.html", "plots", "samples", "sweep.json"])
def test_files_of_others_are_not_overwritten(name, searching, tmp_path):
    (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=f"{name} was not made by a run of this folder"):
        run_study(searching, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_batches_that_two_runs_at_once_wrote_twice_count_once(
    searching, searched, tmp_path, monkeypatch
):
    workdir = shutil.copytree(searched, tmp_path / "search")
    with (workdir / "runs.jsonl").open("a") as file:
        file.writelines((searched / "runs.jsonl").read_text().splitlines(keepends=True)[:3])
    monkeypatch.setattr(samples, "generate", None)
    run_study(searching, workdir)
    assert results_of(workdir)["schedules"] == results_of(searched)["schedules"]
    np.testing.assert_array_equal(read_search(workdir)[1], read_search(searched)[1])


def test_another_configuration_is_refused_but_not_another_reading(
    searching, searched, tmp_path, monkeypatch
):
    workdir = shutil.copytree(searched, tmp_path / "search")
    with pytest.raises(InputError, match=r"holds another study \(config.seed differ\)"):
        run_study(dataclasses.replace(searching, seed=1), workdir)
    monkeypatch.setattr(samples, "generate", None)
    run_study(dataclasses.replace(searching, aggregate="corpus", num_extremes=1), workdir)
    assert sum(results_of(workdir)["segments"]["light_in_best"]) == 2


def test_relative_paths_name_the_same_study(
    comparing, compared, study_models, tmp_path, monkeypatch
):
    workdir = shutil.copytree(compared, tmp_path / "study")
    monkeypatch.chdir(study_models)
    monkeypatch.setattr(samples, "generate", None)  # nothing is left to sample
    models = (("H", "H"), ("L", "../" + study_models.name + "/L"))
    run_study(dataclasses.replace(comparing, models=models, scorer="./S"), workdir)
    assert records_of(workdir) == records_of(compared)


def test_results_of_something_else_are_not_overwritten(comparing, searched, tmp_path):
    workdir = shutil.copytree(searched, tmp_path / "search")
    with pytest.raises(InputError, match=r"is not of a ProposeStudy; choose another --workdir"):
        run_study(ProposeStudy(search=str(workdir), budgets=(1,), num_repeats=2), workdir)
    assert results_of(workdir) == results_of(searched)
    (tmp_path / "results.json").write_text('{"config": {}, "runs": []}')  # of a sweep
    with pytest.raises(InputError, match=r"is not of a ScheduleStudy; choose another --workdir"):
        run_study(comparing, tmp_path)


def test_a_study_from_before_a_setting_existed_goes_on(searching, searched, tmp_path, monkeypatch):
    workdir = shutil.copytree(searched, tmp_path / "search")
    path = workdir / "study.json"
    old = read_json(path)
    del old["config"]["precision"], old["config"]["mesh"]
    path.write_text(json.dumps(old))
    with pytest.raises(InputError, match=r"holds another study \(config.precision differ\)"):
        run_study(dataclasses.replace(searching, precision="float32"), workdir)
    monkeypatch.setattr(samples, "generate", None)  # nothing is left to sample
    run_study(searching, workdir)


def test_a_study_with_the_earlier_names_of_settings_goes_on(
    searching, searched, tmp_path, monkeypatch
):
    workdir = shutil.copytree(searched, tmp_path / "search")
    for name in ("study.json", "results.json", "samples/models.json"):
        old = read_json(workdir / name)
        for now, before in {"static_layers": "static", "num_extremes": "top"}.items():
            if now in old["config"]:
                old["config"][before] = old["config"].pop(now)
        assert "static" in old["config"]
        (workdir / name).write_text(json.dumps(old))
    assert read_search(workdir)[0] == searching
    monkeypatch.setattr(samples, "generate", None)  # nothing is left to sample
    run_study(searching, workdir)
    stored = dataclasses.replace(searching, samples=str(workdir))
    run_study(stored, tmp_path / "stored")
    assert records_of(tmp_path / "stored") == records_of(searched)


def test_a_budget_tries_what_looks_best(searching, searched, importance, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "coarse_schedules", None)  # nor is a list of all made for it
    cfg = dataclasses.replace(searching, budget=2, importance=str(importance[1]))
    run_study(cfg, tmp_path)
    tried = [row["schedule"] for row in results_of(tmp_path)["schedules"]]
    harm = read_harms(cfg.importance, "L", 4)["relative_kl"]
    order = np.argsort(Placements(4, 2).table @ harm, kind="stable")[:2]
    assert set(tried) == {str(coarse_schedules(cfg)[i]) for i in order}
    full = {(r["schedule"], r["first"]): r for r in records_of(searched)}
    for record in records_of(tmp_path):
        assert record == full[record["schedule"], record["first"]]


def test_bad_studies_are_refused_before_anything_runs(
    settings, searching, importance, study_models, tmp_path
):
    def refused(cfg, message):
        with pytest.raises(InputError, match=message) as error:
            run_study(cfg, tmp_path / "refused")
        assert "\n" not in str(error.value)

    refused(ScheduleStudy(**settings, schedules=("H6,X2",)), "no model is called 'X'")
    refused(dataclasses.replace(importance[0], schedules=("X8",)), "no model is called 'X'")
    refused(ScheduleStudy(**settings, schedules=("H6",)), r"H6 has 6 steps.*steps=8")
    heavy = str(study_models / "H")
    refused(ScheduleStudy(**(settings | {"scorer": heavy}), schedules=("H8",)), "not causal")
    refused(
        ScheduleStudy(**settings, schedules=("H8",), static_layers=(("L", "3"),)),
        "layer 3 does not exist",
    )
    refused(ProposeStudy(search=str(study_models)), "results.json is missing")
    assert not (tmp_path / "refused" / "runs.jsonl").exists()
    for changes, message in (
        ({"scorer": ""}, "scorer is missing"),
        ({"static_layers": (("X", "1"),)}, "no model is called 'X'"),
        ({"static_layers": (("L", "one"),)}, "'one' of L are no layers; give numbers such as 3,7"),
        ({"static_layers": (("L", "2²"),)}, "'2²' of L are no layers; give numbers such as 3,7"),
        ({"num_segments": 3}, "steps=8 do not split into 3"),
        ({"light": "X"}, "no model is called 'X'"),
        ({"light": "H"}, "heavy and light are both 'H'"),
        ({"num_light": 4}, "num_light=4"),
        (
            {"num_segments": 30, "num_light": 15, "steps": 30},
            "155,117,520 schedules are too many to try all; give a budget",
        ),
        ({"budget": 7}, "budget=7 must lie in 1 to 6"),
    ):
        with pytest.raises(InputError, match=message):
            dataclasses.replace(searching, **changes)
    with pytest.raises(InputError, match="heavy and second_heavy are both 'H'"):
        dataclasses.replace(importance[0], second_heavy="H")


def test_eval_takes_every_kind_of_study(tmp_path):
    file = tmp_path / "study.py"
    file.write_text(
        "from dials_jax.config import SearchStudy\n"
        "def get_config():\n"
        "    return SearchStudy(models=(('H', 'a'), ('L', 'b')), scorer='c')\n"
    )
    cfg = load_config(str(file), EvalConfig | StudyConfig)
    flags = ["--steps", "50", "--models", "H", "x", "L", "y", "--mesh.data", "1"]
    cfg = override(cfg, flags)
    assert isinstance(cfg, SearchStudy) and cfg.steps == 50 and cfg.mesh.data == 1
    assert cfg.models == (("H", "x"), ("L", "y"))
    with pytest.raises(InputError, match="steps=55 do not split into 10 equal segments"):
        override(cfg, ["--steps", "55"])
