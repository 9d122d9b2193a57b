"""Outputs are stored before they are scored, so that the rules may change afterwards."""

import dataclasses
import json

import pytest

from dials_jax.config import EvalConfig, EvalTask, TaskData
from dials_jax.data.tokenizer import load_tokenizer
from dials_jax.errors import InputError
from dials_jax.evaluation import batched, outputs
from dials_jax.evaluation.items import load_items
from dials_jax.evaluation.sweep import sweep
from dials_jax.files import read_json
from dials_jax.loading import load
from dials_jax.sampling.confidence import Confidence

pytestmark = pytest.mark.usefixtures("without_plots")


@pytest.fixture(scope="module")
def cfg(arithmetic_model, tmp_path_factory):
    """Two policies on four prompts; the exact texts are of a random model."""
    path = tmp_path_factory.mktemp("outputs") / "records.jsonl"
    answers = {"1": "1", "23": "0", "4": "000", "57": "57"}
    records = [
        {"prompt": f"{a}+2=", "answer": answer, "number": 0} for a, answer in answers.items()
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    task = EvalTask(
        name="sums",
        metric="exact_match",
        data=TaskData(paths=(str(path),), prompt_length=8, answer_length=4),
        sampler=Confidence(4),
    )
    return EvalConfig(
        model=str(arithmetic_model / "model"), tasks=(task,), num_static=(), num_random=(1,),
        batch_size=4,
    )  # fmt: skip


def with_task(cfg, **changes):
    return dataclasses.replace(cfg, tasks=(dataclasses.replace(cfg.tasks[0], **changes),))


def code(cfg, program, **changes):
    changes = {"allow_code_execution": True, "time_limit": 1} | changes
    return with_task(cfg, metric="code", program=program, **changes)


def stored(workdir, kind):
    lines = (workdir / "runs.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if kind in record]


def forbid(monkeypatch, module, name):
    def refuse(*args, **kwargs):
        raise AssertionError(f"{name} was called")

    monkeypatch.setattr(module, name, refuse)


def test_other_rules_score_what_was_generated(cfg, tmp_path, monkeypatch):
    first = sweep(cfg, tmp_path)
    batches = stored(tmp_path, "scores")
    assert all(len(batch["outputs"]) == 4 for batch in batches) and len(batches) == 2
    forbid(monkeypatch, batched, "generate")
    second = sweep(with_task(cfg, extract="..?.?", match="first"), tmp_path)
    assert {run["policy"]["label"] for run in second["runs"]} == {"full", "random k=1"}
    scores = [list(found["runs"][0]["items"].values()) for found in (first, second)]
    assert scores == [[0, 0, 0, 0], [0, 0, 1, 0]]  # the model says 0000
    assert stored(tmp_path, "scores") == batches
    # and back: the scores are those of the first time
    again = sweep(cfg, tmp_path)
    assert [run["items"] for run in again["runs"]] == [run["items"] for run in first["runs"]]
    number = len(stored(tmp_path, "run"))
    sweep(cfg, tmp_path)
    assert len(stored(tmp_path, "run")) == number == 6


def test_scores_by_two_rules_are_never_shown_together(cfg, tmp_path):
    sweep(cfg, tmp_path)
    full = dataclasses.replace(with_task(cfg, until=("9",)), num_random=())
    found = sweep(full, tmp_path)
    assert [(run["task"], run["policy"]["label"]) for run in found["runs"]] == [
        ("sums", "full"), ("sums, earlier rules", "full"), ("sums, earlier rules", "random k=1"),
    ]  # fmt: skip
    found = sweep(with_task(cfg, until=("9",)), tmp_path)  # now all are scored by the new ones
    assert [run["task"] for run in found["runs"]] == ["sums", "sums"]


def test_without_stored_outputs_other_rules_are_scored_anew(cfg, tmp_path):
    sweep(cfg, tmp_path)
    mark = read_json(tmp_path / "sweep.json")
    del mark["tasks"]["sums"]["outputs"]  # as versions wrote it that stored scores alone
    (tmp_path / "sweep.json").write_text(json.dumps(mark))
    batches = stored(tmp_path, "scores")
    found = sweep(with_task(cfg, until=("9",)), tmp_path)
    assert [run["task"] for run in found["runs"]] == 2 * ["sums, until ['9']"] + 2 * ["sums"]
    assert len(stored(tmp_path, "scores")) == 2 * len(batches)


def test_choices_are_compared_otherwise_by_what_is_stored(cfg, tmp_path, monkeypatch):
    choice = {
        "metric": "choice", "sampler": None, "choices": ("{answer}9", "7"), "num_samples": 2,
        "label": "number",
    }  # fmt: skip
    choice = with_task(cfg, **choice)
    first = sweep(choice, tmp_path)
    batches = stored(tmp_path, "scores")
    forbid(monkeypatch, batched, "score_pairs")
    for unit in ("tokens", "characters"):  # as many, with one token a character
        second = sweep(with_task(choice, normalise=unit, mean_over="prompt"), tmp_path)
        assert stored(tmp_path, "scores") == batches
        for before, now in zip(first["runs"], second["runs"], strict=True):
            accuracy = sum(now["items"].values()) / 4
            assert (
                accuracy == before["also"]["accuracy_per_token"] == now["also"]["mean_over_prompt"]
            )
            assert before["also"]["accuracy_per_character"] == accuracy
    assert sweep(choice, tmp_path)["runs"][0]["items"] == first["runs"][0]["items"]


# ------------------------------------------------------------------------------------------ code


def test_code_needs_permission_before_any_work(cfg, tmp_path, monkeypatch):
    forbid(monkeypatch, outputs, "execute_programs")
    program = "int('{output}')"
    with pytest.raises(InputError, match="'sums' executes what the model writes; read"):
        sweep(code(cfg, program, allow_code_execution=False), tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()
    with pytest.raises(InputError, match="executes no output; put"):
        code(cfg, "assert True")
    with pytest.raises(InputError, match="extract='x' is of exact_match"):
        code(cfg, program, extract="x")
    with pytest.raises(InputError, match="is for metric 'code'; leave it out"):
        with_task(cfg, program=program[5:-2])
    with pytest.raises(InputError, match="is for generation, but metric 'nelbo'"):
        with_task(cfg, metric="nelbo", sampler=None, program="{output}")


def test_items_of_code_hold_their_program(cfg):
    model = load(cfg.model)
    tokenizer = load_tokenizer(model.path)
    (task,) = code(cfg, "x = '{output}'\nassert x == '{answer}'").tasks
    (item, *_) = load_items(task, tokenizer, model.config)
    assert item.program == f"x = '{outputs.OUTPUT}'\nassert x == '1'" and item.reference == "1"
    changed = dataclasses.replace(task, program="{output}")
    assert load_items(changed, tokenizer, model.config)[0].key == item.key


def test_samples_are_stored_before_they_are_executed(cfg, tmp_path, monkeypatch):
    executed = []

    def stop(programs, seconds):
        executed.append(len(stored(tmp_path, "scores")))
        raise KeyboardInterrupt

    execute_programs = outputs.execute_programs
    monkeypatch.setattr(outputs, "execute_programs", stop)
    cfg = code(cfg, "text = '{output}'\nassert text < '{answer}', text")
    with pytest.raises(KeyboardInterrupt):
        sweep(cfg, tmp_path)
    assert executed == [1]
    monkeypatch.setattr(outputs, "execute_programs", execute_programs)
    found = sweep(cfg, tmp_path)
    for run in found["runs"]:
        right = [example["output"] < example["reference"] for example in run["examples"]]
        assert set(right) == {True, False}
        assert list(run["items"].values()) == [float(x) for x in right]
        for example, passed in zip(run["examples"], right, strict=True):
            verdict = "passed" if passed else f"AssertionError: {example['output']}"
            assert example["verdict"] == verdict
    # Nothing is generated or executed again, and other tests execute what was generated.
    forbid(monkeypatch, batched, "generate")
    other = sweep(code(cfg, "assert '{output}' is None"), tmp_path)
    assert {x for run in other["runs"] for x in run["items"].values()} == {0.0}
    forbid(monkeypatch, outputs, "execute_programs")
    again = sweep(code(cfg, "assert '{output}' is None"), tmp_path)
    assert [run["items"] for run in again["runs"]] == [run["items"] for run in other["runs"]]
