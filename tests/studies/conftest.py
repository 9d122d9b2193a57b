"""Studies of schedules on tiny models."""

import dataclasses

import numpy as np
import pytest

from dials_jax.config import (
    ArithmeticData,
    ImportanceStudy,
    ScheduleStudy,
    SearchStudy,
    TextData,
)
from dials_jax.data.arithmetic import ArithmeticTask
from dials_jax.models.folders import save_model
from dials_jax.reporting.publish import publish
from dials_jax.studies import study
from dials_jax.studies.study import run_study
from tests.conftest import amplify, init_params, small_config
from tests.studies.workdirs import LENGTH, STEPS


@pytest.fixture(scope="package")
def quick_plots():
    """Drawing is slow; what is drawn is tested beside the plots."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            study,
            "publish",
            lambda report, folder: publish(
                dataclasses.replace(report, figures=(), chapters=()), folder
            ),
        )
        yield


@pytest.fixture(scope="package")
def study_models(quick_plots, tmp_path_factory):
    """Model folders H, L, H2 and S (a causal scorer) of one tokenizer, and a text."""
    folder = tmp_path_factory.mktemp("study")
    tokenizer = ArithmeticTask(ArithmeticData()).tokenizer
    tokenizer.save(folder)
    shapes = {"H": (2, False), "H2": (2, False), "L": (1, False), "S": (1, True)}
    for seed, (name, (num_layers, causal)) in enumerate(shapes.items()):
        cfg = small_config(
            num_layers=num_layers, vocab_size=19, mask_id=18, max_length=32, causal=causal
        )
        lively = amplify(init_params(cfg, seed), 8)
        save_model(folder / name, cfg, lively, tokenizer_files=[folder / "tokenizer.json"])
    digits = np.random.default_rng(0).integers(0, 10, 4000)
    (folder / "text.txt").write_text("".join(map(str, digits)))
    return folder


@pytest.fixture(scope="package")
def run_once(tmp_path_factory):
    """Runs a study into a folder of its own."""

    def run(cfg):
        workdir = tmp_path_factory.mktemp(type(cfg).__name__)
        run_study(cfg, workdir)
        return workdir

    return run


@pytest.fixture(scope="package")
def settings(study_models):
    return {
        "models": (("H", str(study_models / "H")), ("L", str(study_models / "L"))),
        "scorer": str(study_models / "S"),
        "length": LENGTH,
        "steps": STEPS,
        "num_samples": 5,
        "batch_size": 3,
        "score_length": 32,
        "dtype": "float32",
        "layout": "stacked",
    }


@pytest.fixture(scope="package")
def comparing(settings):
    return ScheduleStudy(**settings, schedules=("H8", "L2,H4,L2", "L8"))


@pytest.fixture(scope="package")
def compared(comparing, run_once):
    return run_once(comparing)


@pytest.fixture(scope="package")
def searching(settings):
    return SearchStudy(**settings, num_segments=4, num_light=2, num_extremes=2)


@pytest.fixture(scope="package")
def searched(searching, run_once):
    return run_once(searching)


@pytest.fixture(scope="package")
def importance(study_models, run_once):
    data = TextData(
        paths=(str(study_models / "text.txt"),), length=16, cache=str(study_models / "cache")
    )
    cfg = ImportanceStudy(
        models=tuple((name, str(study_models / name)) for name in ("H", "H2", "L")),
        second_heavy="H2",
        data=data,
        schedules=("L2,H4,L2", "H2,L4,H2", "L8", "H4,L4"),
        num_times=3,
        num_sequences=6,
        batch_size=4,
        layout="stacked",
    )
    return cfg, run_once(cfg)
