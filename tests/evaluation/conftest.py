"""A sweep as eval.py writes it, with made-up numbers; and studies of schedules on tiny models."""

import jax
import numpy as np
import pytest

from dials_jax import trees
from dials_jax.config import (
    ArithmeticData,
    ImportanceStudy,
    ScheduleStudy,
    SearchStudy,
    TextData,
)
from dials_jax.data.arithmetic import ArithmeticTask
from dials_jax.models import transformer
from dials_jax.models.folders import save_model
from dials_jax.studies import importance as importance_study
from dials_jax.studies import proposals, study
from dials_jax.studies.study import run_study
from tests.conftest import small_config
from tests.evaluation.studies import LENGTH, STEPS

NUM_LAYERS, NUM_BINS, NUM_ITEMS = 12, 10, 120
METRICS = {"sums": "exact_match", "piqa": "choice", "text": "nelbo"}
POLICIES = [
    {"kind": "full", "label": "full"},
    *({"kind": "static", "label": f"static k={k}", "num_skipped": k} for k in (1, 2, 3, 4)),
    *({"kind": "random", "label": f"random k={k}", "num_skipped": k} for k in (1, 2, 3, 4)),
    *({"kind": "routed", "label": f"routed λ={x:g}", "lambda": x} for x in (0.3, 1.0, 3.0)),
]


def executed_shares(policy):
    """[bins, L] chance that a layer is executed at a mask ratio."""
    shares = np.ones((NUM_BINS, NUM_LAYERS))
    k = policy.get("num_skipped")
    if policy["kind"] == "static":
        shares[:, [5, 7, 9, 3][:k]] = 0
    if policy["kind"] == "random":
        shares[:] = 1 - k / NUM_LAYERS
    if policy["kind"] == "routed":
        ratio = (np.arange(NUM_BINS)[:, None] + 0.5) / NUM_BINS
        late = np.linspace(-0.6, 0.6, NUM_LAYERS) + 0.25 * np.sin(np.arange(NUM_LAYERS) * 2.1)
        shares = np.clip(1 - 0.45 * policy["lambda"] ** 0.5 * late.clip(0) * (1.4 - ratio), 0, 1)
    return shares


def make_run(task, policy, num_items=NUM_ITEMS):
    seed = [ord(c) for c in task + policy["label"]]
    items_rng, run_rng = np.random.default_rng(len(task)), np.random.default_rng(seed)
    price = {"full": 0, "static": 0.5, "random": 1.1, "routed": 0.15}[policy["kind"]]
    ability, noise = items_rng.normal(0.8, 1, num_items), run_rng.normal(0, 0.3, num_items)
    shares = executed_shares(policy)
    scores = ability + noise * (price > 0) - 3 * price * (1 - shares.mean())
    scores = 3 - scores / 4 if METRICS[task] == "nelbo" else (scores > 0).astype(int)
    rows = np.full(NUM_BINS, 64 * num_items // NUM_BINS)
    if task == "piqa":
        rows[:2] = 0  # short answers never reach a small mask ratio
    return {
        "task": task,
        "metric": METRICS[task],
        "policy": dict(policy),
        "items": {f"{task}-{i}": score for i, score in enumerate(scores.tolist())},
        "flops": {
            "layers_run": float(shares.mean()),
            "model": float(0.93 * shares.mean() + 0.07),
            "model_total": 1.2e12 * float(0.93 * shares.mean() + 0.07),
            "seconds": float(40 * shares.mean() + 5),
        },
        "execution": {"executed": (shares * rows[:, None]).tolist(), "rows": rows.tolist()},
        **({"examples": list(EXAMPLES)} if METRICS[task] == "exact_match" else {}),
    }


EXAMPLES = [
    {"prompt": "12+34=", "output": "46", "reference": "46", "correct": True},
    {"prompt": "<b>max</b> 3 & 9:", "output": "3", "reference": "9", "correct": False},
]


@pytest.fixture
def make_results():
    """A function (tasks, kinds) -> results; by default the whole sweep."""

    def make(tasks=tuple(METRICS), kinds=("full", "static", "random", "routed")):
        return {
            "model": {
                "path": "checkpoints/llada_arithmetic",
                "num_layers": NUM_LAYERS,
                "parameters": 25_165_824,
                "fingerprint": "9f2c41d07a",
            },
            "environment": {
                "device": "cpu",
                "dtype": "float32",
                "jax": "0.10.2",
                "flax": "0.12.8",
                "python": "3.12.4",
                "date": "2025-01-01",
                "command": "python eval.py --config configs/eval_arithmetic.py --workdir runs/eval",
                "seed": 0,
                "mesh": {"data": 1, "fsdp": 1, "tensor": 1},
            },
            "runs": [make_run(t, p) for t in tasks for p in POLICIES if p["kind"] in kinds],
        }

    return make


# ------------------------------------------------------------------------------------- studies


@pytest.fixture(scope="package")
def quick_plots():
    """Drawing is slow; what is drawn is tested beside the plots."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("plot_schedules", "plot_search"):
            patch.setattr(study.report, name, lambda *args: {})
        for name in ("plot_importance", "plot_predictions"):
            patch.setattr(importance_study, name, lambda *args: {})
        patch.setattr(proposals, "plot_proposals", lambda *args: {})
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
        params = transformer.init(cfg, jax.random.key(seed))
        lively = trees.map_named(lambda path, x: x if "norm" in path else 8 * x, params)
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
    return SearchStudy(**settings, num_segments=4, num_light=2, top=2)


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
        heavy2="H2",
        data=data,
        schedules=("L2,H4,L2", "H2,L4,H2", "L8", "H4,L4"),
        num_times=3,
        num_sequences=6,
        batch_size=4,
        layout="stacked",
    )
    return cfg, run_once(cfg)
