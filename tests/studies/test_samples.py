"""Samples that a study has kept are scored again, without the models that drew them."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from dials_jax.data.tokenizer import character_tokenizer, load_tokenizer
from dials_jax.errors import InputError
from dials_jax.evaluation.perplexity import retokenise, score_samples
from dials_jax.files import read_json
from dials_jax.loading import load
from dials_jax.studies import samples
from dials_jax.studies.perplexity_run import join_batches
from dials_jax.studies.study import run_study
from tests.studies.workdirs import records_of, results_of

pytestmark = pytest.mark.usefixtures("quick_plots")


@pytest.fixture
def without_models(compared, searched, monkeypatch):
    """No model can be loaded to draw with, and nothing can be drawn."""
    monkeypatch.setattr(samples, "generate", None)
    monkeypatch.setattr(samples, "load", None)


def kept_tokens(workdir, schedule):
    batches = [np.load(workdir / f"samples/{schedule}-{first}.npy") for first in (0, 3)]
    return np.concatenate(batches).astype(np.int32)


@pytest.mark.parametrize("study", ["compared", "searched"])
def test_the_same_scorer_says_the_same(study, request, without_models, tmp_path):
    old = request.getfixturevalue(study)
    cfg = request.getfixturevalue({"compared": "comparing", "searched": "searching"}[study])
    run_study(dataclasses.replace(cfg, samples=str(old)), tmp_path)
    assert records_of(tmp_path) == records_of(old)
    new, before = results_of(tmp_path), results_of(old)
    assert new["schedules"] == before["schedules"]
    assert new["models"] == before["models"] and new["examples"] == before["examples"]
    assert not (tmp_path / "samples").exists()


def test_another_scorer_reads_the_same_samples(
    comparing, compared, study_models, without_models, tmp_path
):
    scorer = shutil.copytree(study_models / "S", tmp_path / "other")
    changes = {"samples": str(compared), "scorer": str(scorer), "score_length": 7}
    run_study(dataclasses.replace(comparing, **changes), tmp_path / "new")
    tokens = kept_tokens(compared, "L2,H4,L2")
    expected = score_samples(load(scorer), tokens[:, :7], 5)
    found = [r for r in records_of(tmp_path / "new") if r["schedule"] == "L2,H4,L2"]
    np.testing.assert_allclose(np.concatenate([r["nll"] for r in found]), expected.nll, rtol=1e-5)
    assert np.concatenate([r["weight"] for r in found]).tolist() == expected.weight.tolist()


def test_kept_samples_may_be_scored_as_text(comparing, compared, study_models, tmp_path):
    cfg = dataclasses.replace(comparing, samples=str(compared), retokenize="always")
    run_study(cfg, tmp_path)
    tokenizer = load_tokenizer(study_models / "L")
    ids = retokenise(
        kept_tokens(compared, "L8"), tokenizer, tokenizer, 1, 1, comparing.score_length
    )
    expected = score_samples(load(study_models / "S"), ids, 5)
    found = [r["nll"] for r in records_of(tmp_path) if r["schedule"] == "L8"]
    np.testing.assert_allclose(np.concatenate(found), expected.nll, rtol=1e-5)


def test_samples_take_as_little_as_the_vocabulary_needs(compared):
    assert np.load(compared / "samples/L8-0.npy").dtype == np.uint8  # 19 tokens
    assert not list((compared / "samples").glob("*.tmp*"))


def test_samples_that_are_missing_or_others_are_refused(comparing, compared, tmp_path):
    def refused(message, **changes):
        with pytest.raises(InputError, match=message) as error:
            run_study(dataclasses.replace(comparing, **changes), tmp_path / "refused")
        assert "\n" not in str(error.value)
        assert not (tmp_path / "refused").exists()

    old = str(shutil.copytree(compared, tmp_path / "old"))
    refused("old has seed=0, but the study 1; make them agree", samples=old, seed=1)
    refused("has num_samples=5, but the study 4", samples=old, num_samples=4)
    one = comparing.models[:1]
    refused("drawn by H, L, but models names H", samples=old, models=one, schedules=("H8",))
    refused("has 0 of 5 samples of H4,L4", samples=old, schedules=("H8", "H4,L4"))
    cut = tmp_path / "old/samples/L8-3.npy"
    cut.write_bytes(cut.read_bytes()[:-1])
    refused("L8-3.npy is damaged", samples=old)
    cut.unlink()
    refused("has 3 of 5 samples of L8; let that study end first", samples=old)
    refused("holds no samples", samples=str(tmp_path))


def test_samples_of_a_study_that_never_asked_for_text_are_scored_by_tokenizer(
    comparing, compared, study_models, tmp_path
):
    changes = {"schedules": ("L8",), "retokenize": "never"}
    run_study(dataclasses.replace(comparing, **changes), tmp_path / "never")
    again = dataclasses.replace(comparing, schedules=("L8",), samples=str(tmp_path / "never"))
    run_study(again, tmp_path / "auto")  # equal tokenizers: as ids
    expected = [r for r in records_of(compared) if r["schedule"] == "L8"]
    assert [r["nll"] for r in records_of(tmp_path / "auto")] == [r["nll"] for r in expected]


def test_another_tokenizer_than_the_samples_had_is_refused(
    comparing, compared, study_models, tmp_path
):
    old = shutil.copytree(compared, tmp_path / "old")
    model = shutil.copytree(study_models / "H", tmp_path / "H")
    character_tokenizer("0123456789").save(model)
    facts = json.dumps(read_json(old / "samples/models.json"))
    (old / "samples/models.json").write_text(facts.replace(str(study_models / "H"), str(model)))
    cfg = dataclasses.replace(comparing, samples=str(old), retokenize="always")
    with pytest.raises(InputError, match="H has another tokenizer than when the samples were"):
        run_study(cfg, tmp_path / "new")


def test_schedules_of_any_length_are_kept(comparing, tmp_path):
    long = ",".join(["H1,L1"] * 60)
    changes = {"schedules": (long,), "steps": 120, "num_samples": 2}
    cfg = dataclasses.replace(comparing, **changes)
    run_study(cfg, tmp_path / "old")
    run_study(dataclasses.replace(cfg, samples=str(tmp_path / "old")), tmp_path / "new")
    assert records_of(tmp_path / "new") == records_of(tmp_path / "old")


def test_where_samples_were_drawn_is_told_of_their_times(comparing, compared, tmp_path):
    run_study(dataclasses.replace(comparing, samples=str(compared)), tmp_path)
    new, old = results_of(tmp_path)["environment"], results_of(compared)["environment"]
    assert {**new, "command": ""} == {**old, "command": ""}


def test_a_budget_needs_a_scorer_that_chooses(searching):
    with pytest.raises(InputError, match="samples: a search with a budget"):
        dataclasses.replace(searching, samples="old", budget=2)


def test_a_flipped_token_is_noticed(comparing, compared, without_models, tmp_path):
    old = shutil.copytree(compared, tmp_path / "old")
    path = old / "samples/L8-3.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"L8-3.npy is damaged: it does not hold what was drawn"):
        run_study(dataclasses.replace(comparing, samples=str(old)), tmp_path / "new")
    assert len(records_of(tmp_path / "new")) == 5  # what was sound is scored and kept
    shutil.copy(compared / "samples/L8-3.npy", path)
    run_study(dataclasses.replace(comparing, samples=str(old)), tmp_path / "new")
    assert records_of(tmp_path / "new") == records_of(compared)


@pytest.mark.parametrize("missing", ["models", "config", "environment"])
def test_damaged_facts_of_samples_are_named(missing, comparing, compared, tmp_path):
    old = shutil.copytree(compared, tmp_path / "old")
    facts = read_json(old / "samples/models.json")
    del facts[missing]
    (old / "samples/models.json").write_text(json.dumps(facts))
    with pytest.raises(InputError, match=r"models.json is damaged.*; copy it again") as error:
        run_study(dataclasses.replace(comparing, samples=str(old)), tmp_path / "new")
    assert "\n" not in str(error.value)


def test_records_are_grouped_in_one_pass():
    """Reading back a study takes as many looks at its records as it has records."""

    class Counted(dict):
        looks = 0

        def __getitem__(self, name):
            Counted.looks += 1
            return super().__getitem__(name)

    looks = []
    for count in (100, 200):
        records = [
            Counted(schedule=f"H{n // 2 + 1}", first=n % 2, nll=[1.0], weight=[1.0], entropy=[0.5],
                    seconds=1.0, flops=1.0)
            for n in reversed(range(count))
        ]  # fmt: skip
        Counted.looks = 0
        batches = samples.group_by_schedule(records)
        values = [join_batches(batches[f"H{n + 1}"]) for n in range(count // 2)]
        assert len(values[0].entropy) == 2 and values[0].seconds == 2
        looks.append(Counted.looks)
    assert looks[1] == 2 * looks[0]
