"""The study of representations, end to end on the golden models, and what stops it early."""

import dataclasses
import json

import numpy as np
import pytest

from dials_jax.config import RepresentationStudy, TaskData, TextData
from dials_jax.errors import InputError
from dials_jax.loading import load, read_config
from dials_jax.sampling.ancestral import Ancestral
from dials_jax.sampling.confidence import Confidence
from dials_jax.sampling.dream import Dream
from dials_jax.skipping.similarity import layer_similarities
from dials_jax.studies import representation
from dials_jax.studies.profile import load_profiles
from dials_jax.studies.settings import spread
from dials_jax.studies.study import run_study
from dials_jax.studies.trajectories import Trajectories
from tests.conftest import small_config
from tests.evaluation.harness_cases import make_model_folder
from tests.studies.workdirs import records_of, results_of

pytestmark = pytest.mark.usefixtures("quick_plots")
NAMES = ("llada_tiny", "dream_tiny", "qwen2_tiny")


@pytest.fixture(scope="module")
def folder(made_once):
    """The golden models with tokenizers, and questions of several lengths."""

    def make(folder):
        for name in NAMES:
            make_model_folder(name, folder / name)
        rows = [{"prompt": f"What is {'1' * n}?", "answer": str(n)} for n in range(1, 7)]
        (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))

    return made_once("representation", make)


@pytest.fixture(scope="module")
def study(folder):
    return RepresentationStudy(
        models=tuple((name, str(folder / name)) for name in NAMES),
        data=TaskData(paths=(str(folder / "questions.jsonl"),), prompt_length=40),
        num_prompts=6,
        gen_length=8,
        steps=4,
        batch_size=4,
        change_layers=(1,),
        adapted=("dream_tiny",),
        dtype="float32",
    )


@pytest.fixture(scope="module")
def finished(study, quick_plots, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("representation")
    return run_study(study, workdir) and workdir


def test_the_study_writes_what_it_measured(study, finished, folder):
    profiles = load_profiles(finished, NAMES)
    results = results_of(finished)["models"]
    verdicts = [claim["verdict"] for claim in results_of(finished)["claims"]]
    assert len(verdicts) == 3 and "not tested" not in verdicts
    for name, profile in profiles.items():
        model = load(folder / name, "float32")
        assert profile.num_sequences == 6 and profile.num_layers == model.num_layers
        layers = profile.sequence_layer.mean(axis=0)
        np.testing.assert_allclose(results[name]["layer_cosine"], layers)
        assert profile.num_bins == (1 if name == "qwen2_tiny" else 4)
        assert (profile.change.count.sum() > 0) == (name != "qwen2_tiny")
    text = (finished / "report.html").read_text()
    for heading in ("Cosine of consecutive layers", "Norms and sinks", "Change by distance"):
        assert heading in text


def test_prompts_are_those_of_algorithm_1(study, finished, folder):
    profile = load_profiles(finished, ["llada_tiny"])["llada_tiny"]
    model = load(folder / "llada_tiny", "float32")
    prompts = representation.load_prompts(study, "llada_tiny", model.config, model.path)
    expected = layer_similarities(model, prompts, study.gen_length, batch_size=4)
    np.testing.assert_allclose(profile.prompt_layer.mean(axis=0), expected, atol=1e-6)


def test_a_stopped_study_continues_with_identical_numbers(study, finished, tmp_path, monkeypatch):
    measure, batches = Trajectories.measure, []

    def stopping(self, *args):
        if len(batches) == 3:
            raise KeyboardInterrupt
        batches.append(self.label)
        return measure(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trajectories, "measure", stopping)
        with pytest.raises(KeyboardInterrupt):
            run_study(study, tmp_path)
    run_study(study, tmp_path)
    assert records_of(tmp_path) == records_of(finished)
    for name in NAMES:
        one, two = (np.load(at / "profiles" / f"{name}.npz") for at in (finished, tmp_path))
        for array in set(one.files) - {"seconds"}:
            np.testing.assert_array_equal(one[array], two[array], err_msg=array)


def test_another_setting_reuses_nothing(study, finished):
    with pytest.raises(InputError, match=r"holds another study .*config.steps.* differ"):
        run_study(dataclasses.replace(study, steps=8), finished)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"window": 400}, "prompt 0 has .* fewer than window=400"),
        ({"gen_length": 250, "steps": None}, "'llada_tiny' has 256 positions, but .* make"),
        ({"num_prompts": 7}, "6 prompts, fewer than num_prompts=7"),
        ({"change_layers": (1, 9)}, "no layer 9; its layers are 0 to 7"),
    ],
)
def test_what_cannot_be_measured_is_said_before_weights_are_read(
    study, tmp_path, monkeypatch, changes, message
):
    monkeypatch.delattr(representation, "load")
    with pytest.raises(InputError, match=message):
        run_study(dataclasses.replace(study, **changes), tmp_path)


def test_a_model_of_one_layer_has_nothing_to_compare(study, monkeypatch):
    monkeypatch.setattr(representation, "read_config", lambda *_: small_config(num_layers=1))
    with pytest.raises(InputError, match="model 'flat' has one layer"):
        representation.make_plan(study, "flat", "flat")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"models": ()}, "models is empty"),
        ({"models": (("a", "x"), ("a", "y"))}, "name one twice"),
        ({"sampler": Confidence(4)}, "gen_length=8, but the sampler generates 4"),
        ({"steps": None, "sampler": Confidence(8, cfg_scale=1.0)}, "set cfg_scale=0"),
        ({"sampler": Confidence(8)}, "steps: the sampler has its own"),
        ({"change_layers": (3, 1)}, "must be different and ascending"),
        ({"adapted": ("Dream",)}, "adapted: no model is called 'Dream'"),
        ({"gen_length": 1}, "neighbours are two tokens"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(study, changes, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(study, **changes)


def test_every_kind_of_model_gets_its_own_sampler(study):
    assert study.sampler_of(small_config()) == Confidence(8, steps=4)
    assert study.sampler_of(small_config(model_type="dream", right_shift=True)) == Dream(8, 4)
    assert study.sampler_of(small_config(model_type="mdlm")) == Ancestral(8, 4)
    own = dataclasses.replace(study, steps=None, sampler=Dream(8, 2))
    assert own.sampler_of(small_config()) == Dream(8, 2)


def test_layers_are_spread_over_the_depth():
    assert spread(32, 8) == (3, 7, 11, 15, 19, 23, 27, 31)
    assert spread(3, 8) == (0, 1, 2)


def test_rows_of_text_begin_with_their_first_tokens(study, folder, tmp_path):
    (tmp_path / "text.txt").write_text("all work and no play " * 40)
    data = TextData(paths=(str(tmp_path / "text.txt"),), length=32, cache=str(tmp_path))
    text = dataclasses.replace(study, data=data, window=5, num_prompts=2)
    path = str(folder / "llada_tiny")
    model = read_config(path)
    for cfg in (model, dataclasses.replace(model, causal=True)):
        assert [len(x) for x in representation.load_prompts(text, "A", cfg, path)] == [5, 5]
