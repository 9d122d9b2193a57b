"""Which layers static policies of a sweep skip: chosen on prompts that are not tested, or given."""

import dataclasses
import json

import pytest

from dials_jax.config import ArithmeticData, EvalConfig, EvalTask, TaskData
from dials_jax.data.tokenizer import load_tokenizer
from dials_jax.errors import InputError
from dials_jax.evaluation import static_choice, sweep
from dials_jax.evaluation.calibration import load_calibration
from dials_jax.evaluation.items import load_items
from dials_jax.loading import load
from dials_jax.reporting import sweep_report
from dials_jax.sampling.confidence import Confidence
from dials_jax.skipping.policies import Static, StaticGates

pytestmark = pytest.mark.usefixtures("without_plots")
SUMS = EvalTask(
    name="sums",
    metric="exact_match",
    data=ArithmeticData(operations=("max",)),
    limit=3,
    sampler=Confidence(gen_length=3),
)


@pytest.fixture(scope="module")
def model(arithmetic_model):
    return load(arithmetic_model)


@pytest.fixture
def cfg(arithmetic_model):
    return EvalConfig(
        model=str(arithmetic_model), tasks=(SUMS,), num_static=(1,), num_random=(),
        num_calibration=5, batch_size=4,
    )  # fmt: skip


@pytest.fixture
def records(tmp_path):
    """Data of three records, and a task on it."""
    path = tmp_path / "records.jsonl"
    lines = [json.dumps({"prompt": f"+{a},{a}=", "answer": str(2 * a)}) for a in (11, 12, 13)]
    path.write_text("\n".join(lines))
    data = TaskData(paths=(str(path),), prompt_length=8, answer_length=4)
    return EvalTask(name="records", metric="nelbo", data=data, num_samples=2)


def calibrate(cfg, task, model):
    tokenizer = load_tokenizer(model.path)
    items = load_items(task, tokenizer, model.config)
    return load_calibration(cfg, task, items, tokenizer, model), items


def test_the_procedural_task_is_calibrated_on_training_items(cfg, model):
    found, _ = calibrate(cfg, SUMS, model)
    every = load_items(dataclasses.replace(SUMS, limit=None), None, model.config)
    assert len(found.items) == 5 and not found.of_test
    assert not {item.prompt for item in found.items} & {item.prompt for item in every}


def test_calibration_data_serves_every_task(cfg, model, records):
    given = dataclasses.replace(cfg, calibration=records.data)
    own = load_items(records, load_tokenizer(model.path), model.config)
    for task in (SUMS, records):
        found, _ = calibrate(given, task, model)
        assert [item.prompt for item in found.items] == [item.prompt for item in own]
        assert not found.of_test


def test_without_training_data_the_report_says_that_test_prompts_were_used(cfg, model, records):
    found, items = calibrate(cfg, records, model)
    assert found.items == items[:5] and found.of_test
    assert "test prompts, because it names no training data; set calibration=" in found.source


@pytest.mark.parametrize("asked, most", [(1, 1), (2, 2), (3, 2)])
def test_a_file_of_few_examples_is_training_data_too(cfg, model, records, asked, most):
    """MMLU's and MBPP's files of examples hold no other records."""
    few = dataclasses.replace(records.data, few_shot=(records.data.paths[0], asked))
    few = dataclasses.replace(few, few_shot_delimiter="", prompt_length=28)
    found = load_calibration(
        cfg, dataclasses.replace(records, data=few), [], load_tokenizer(model.path), model
    )
    assert not found.of_test
    one = len("+11,11=22")
    assert [len(item.prompt) for item in found.items] == 3 * [most * one + len("+11,11=")]


def test_static_layers_need_prompts(cfg, model, records):
    empty = dataclasses.replace(records, data=dataclasses.replace(records.data, prompt=""))
    with pytest.raises(InputError, match=r"'records' has empty prompts.*set num_static=\(\) or"):
        calibrate(cfg, empty, model)


def test_given_sets_are_scored_and_say_what_chose_the_others(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep_report, "_figures", lambda *args: [])
    cfg = dataclasses.replace(cfg, static_layers=((2,), (3, 1)))
    runs = sweep.sweep(cfg, tmp_path)["runs"]
    policies = {run["policy"]["label"]: run["policy"].get("layers") for run in runs}
    assert len(policies.pop("static k=1")) == 1
    assert policies == {"full": None, "static {2}": [2], "static {1, 3}": [1, 3]}
    notes = [run.get("calibration") for run in runs if run["policy"]["label"] == "static k=1"]
    assert notes == ["the first 5 prompts of its training data"]
    for run in runs:
        skipped = set(run["policy"].get("layers", ()))
        counts = [sum(column) for column in zip(*run["execution"]["executed"], strict=True)]
        assert {layer for layer, count in enumerate(counts) if count == 0} == skipped
        assert run["flops"]["layers_run"] == 1 - len(skipped) / 4


@pytest.mark.parametrize("layers", [((4,),), ((-1, 2),), ((),)])
def test_a_set_names_layers_from_zero(cfg, tmp_path, layers):
    with pytest.raises(InputError, match=r"counted from 0 to 3; .*write their \{5, 7\} as \(4, 6"):
        sweep.sweep(dataclasses.replace(cfg, static_layers=layers), tmp_path)


def test_a_set_is_given_once(cfg, tmp_path):
    with pytest.raises(InputError, match=r"static_layers: .* names one twice"):
        sweep.sweep(dataclasses.replace(cfg, static_layers=((1, 2), (2, 1))), tmp_path)


def test_a_program_per_set_only_where_it_has_no_branches(arithmetic_model):
    unrolled, stacked = (load(arithmetic_model, layout=x) for x in ("unrolled", "stacked"))
    assert static_choice._static_policy(unrolled, (2,), num_sets=3) == Static((2,))
    for model, num_sets in ((unrolled, 4), (stacked, 1)):
        policy = static_choice._static_policy(model, (2,), num_sets)
        assert isinstance(policy, StaticGates) and policy.gates.tolist() == [1, 1, 0, 1]
