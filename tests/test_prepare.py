"""`prepare.py` and `train.py` share one configuration: what the first leaves, the second reads."""

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dials_jax import progress, sharding
from dials_jax.commands import load_config
from dials_jax.config import TrainConfig
from dials_jax.data import prepare
from dials_jax.training import run

ROOT = Path(__file__).parents[1]

CONFIG = """
from dials_jax.config import *
from tests.conftest import small_config

def get_config():
    return TrainConfig(
        model=small_config(vocab_size=19, mask_id=18),
        data=CorpusData(folder={folder!r}, paths=({texts!r},), tokenizer={tokenizer!r}, length=8,
                        num_validation=2, reader="numpy"),
        optimizer=OptimizerConfig(learning_rate=1e-2, num_steps=2, warmup_steps=1),
    )
"""


@pytest.fixture
def config(tmp_path, arithmetic_model):
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(9):
        (texts / f"{i}.txt").write_text(f"{i},{i + 1}=" * 10)
    values = {"folder": tmp_path / "corpus", "texts": texts, "tokenizer": arithmetic_model}
    path = tmp_path / "config.py"
    path.write_text(CONFIG.format(**{name: str(value) for name, value in values.items()}))
    return path


@pytest.fixture
def prepare_py(monkeypatch, capsys):
    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, arguments)])
        runpy.run_path(str(ROOT / "prepare.py"), run_name="__main__")
        return capsys.readouterr().out

    return command


def test_training_reads_what_the_command_prepared(config, prepare_py, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:  # named folders that do not exist, in one line
        prepare_py("--config", config, "--data.paths", "missing")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: missing is missing; correct paths\n"
    out = prepare_py("--config", config)
    assert "train: 7 documents, 287 tokens, 47 rows" in out
    assert "validation: 2 documents, 82 tokens, 13 rows" in out
    assert prepare_py("--config", config) == out  # verified
    cfg = load_config(str(config), TrainConfig)
    assert run.prepare_run(cfg, sharding.make_mesh(cfg.mesh)).data.num_rows == 47


def test_what_the_corpus_will_take_is_said_after_its_first_documents(
    config, prepare_py, monkeypatch
):
    monkeypatch.setattr(prepare, "PROBE_DOCUMENTS", 2)
    monkeypatch.setattr(progress, "LONG", 0.0)
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda folder: SimpleNamespace(free=100))
    shown = prepare_py("--config", config).splitlines()
    # Each text has 40 characters, and an end of text behind it; a token takes 1 byte.
    assert "train: 7 documents, about 287 tokens, 0.0 MB on the disk" in shown
    [line] = {x for x in shown if x.startswith("this will not fit")}
    assert line.endswith("corpus/parts has 0.0 MB free; make room, or choose another data.folder")
    assert any(x.startswith("train: the rest: about ") for x in shown)


@pytest.mark.parametrize("file, message", [("demo/model", "is not a CorpusData")])
def test_a_configuration_without_a_corpus_is_refused(prepare_py, capsys, file, message):
    with pytest.raises(SystemExit) as stop:
        prepare_py("--config", ROOT / f"configs/{file}.py")
    assert stop.value.code == 2 and message in capsys.readouterr().err
