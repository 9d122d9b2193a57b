"""Right files and settings, of which malformed ones are made. No model is compiled."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np

from dials_jax import trees
from dials_jax.config import (
    ArithmeticData,
    CorpusData,
    EvalConfig,
    EvalTask,
    ImportanceStudy,
    MeshConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ProposeStudy,
    RouterConfig,
    SamplingStudy,
    ScheduleStudy,
    SearchStudy,
    TaskData,
    TextData,
    TrainConfig,
    to_dict,
)
from dials_jax.data.arithmetic import ArithmeticTask
from dials_jax.data.prepare import prepare_corpus
from dials_jax.models import families, transformer
from dials_jax.models.folders import save_model
from dials_jax.models.model import Model
from dials_jax.skipping.routed import init_routers
from dials_jax.skipping.storage import save_router

GOLDEN = Path(__file__).parents[1] / "golden"
STORED_SWEEP = Path(__file__).parents[1] / "evaluation" / "stored_sweep"
MODEL = families.llada_small(
    num_layers=2, d_model=16, vocab_size=19, mask_id=18, eos_id=1, pad_id=0, head_dim=8,
    max_length=32, dtype="float32",
)  # fmt: skip
TASK = EvalTask(name="sums", metric="exact_match", data=ArithmeticData())
MODELS = (("H", "runs/heavy"), ("L", "runs/light"))
OPTIMIZER = OptimizerConfig(num_steps=10, warmup_steps=1)
TRAINING = TrainConfig(model=MODEL, data=ArithmeticData(num_items=100), optimizer=OPTIMIZER)
SETTINGS = (
    MODEL, TASK, OPTIMIZER, TRAINING, TextData(), CorpusData(folder="corpus"), TaskData(),
    ArithmeticData(), EvalConfig(model="model", tasks=(TASK,)), RouterConfig(), MeshConfig(),
    ObjectiveConfig(), SamplingStudy(models=MODELS, scorer="gpt2"),
    ScheduleStudy(models=MODELS, scorer="gpt2", schedules=("H4",)),
    SearchStudy(models=MODELS, scorer="gpt2"), ImportanceStudy(models=MODELS, data=TextData()),
    ProposeStudy(search="runs/search"),
)  # fmt: skip
CONFIG_FILE = """
from dials_jax.config import *
from dials_jax.models.families import llada_small

def get_config():
    model = llada_small(num_layers=2, d_model=16, vocab_size=19, mask_id=18, eos_id=1, pad_id=0,
                        max_length=32, dtype="float32")
    optimizer = OptimizerConfig(num_steps=4, warmup_steps=1)
    return TrainConfig(model=model, data=ArithmeticData(num_items=100), optimizer=optimizer)
"""


def zeros(make, *args):
    """Parameters of zeros in the shapes that a function would give them; nothing is compiled."""
    shapes = jax.eval_shape(partial(make, *args), jax.random.key(0))
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)


def make_world(folder: Path) -> SimpleNamespace:
    """A model and routers on disk and in memory, a prepared corpus and a configuration file."""
    tokenizer = ArithmeticTask(ArithmeticData()).tokenizer
    tokenizer.save(folder)
    params = zeros(transformer.init, MODEL)
    save_model(folder / "model", MODEL, params, tokenizer_files=[folder / "tokenizer.json"])
    model = Model(MODEL, params)
    routers = zeros(init_routers, MODEL.d_model, MODEL.num_layers, RouterConfig(d_hidden=8))
    save_router(folder / "router", routers, RouterConfig(d_hidden=8), model, skip_weight=1.0)
    (folder / "text.txt").write_text("".join("+12,34=46\n" for _ in range(40)))
    (folder / "lines.jsonl").write_text("".join('{"text": "+12,34=46"}\n' for _ in range(40)))
    corpus = CorpusData(
        folder=str(folder / "corpus"), paths=(str(folder / "lines.jsonl"),), length=8,
        num_validation=8, tokenizer=str(folder), reader="numpy",
    )  # fmt: skip
    prepare_corpus(corpus, MODEL)
    (folder / "config.py").write_text(CONFIG_FILE)
    return SimpleNamespace(
        folder=folder, model=model, tokenizer=tokenizer, corpus=corpus,
        training={"train": to_dict(TRAINING), "data": "0" * 16},
        num_parameters=trees.count_parameters(params),
    )  # fmt: skip


def stored(path: Path) -> dict:
    return json.loads(path.read_text())
