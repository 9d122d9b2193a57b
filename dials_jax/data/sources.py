"""Opens the training data, and its tokenizer, that a data configuration describes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dials_jax.config import ArithmeticData, CorpusData, Data, ModelConfig, TextData
from dials_jax.data.arithmetic import ArithmeticTask
from dials_jax.data.batches import TrainingData
from dials_jax.data.corpus import load_corpus, read_manifest
from dials_jax.data.tasks import load_task_rows
from dials_jax.data.text import pack_text
from dials_jax.data.tokenizer import Tokenizer, check_tokenizer, has_tokenizer, load_tokenizer
from dials_jax.errors import require
from dials_jax.files import CHAT_TEMPLATES


def load_training_data(
    cfg: Data, model_config: ModelConfig, model_folder: str = "", held_out: bool = False
) -> tuple[TrainingData, Tokenizer]:
    """Opens the rows that train a model or its routers, and their tokenizer.

    Args:
      model_folder: where the tokenizer is if the configuration names none.
      held_out: the rows are for validation; of the procedural task they are others then. Other
        kinds name the rows themselves.

    Raises: InputError for data that does not fit the model.
    """
    tokenizer = load_data_tokenizer(cfg, model_folder)
    task = ArithmeticTask(cfg) if isinstance(cfg, ArithmeticData) else cfg
    check_tokenizer(tokenizer, model_config)
    require(
        model_config.eos_id is not None or isinstance(cfg, ArithmeticData),
        "the model has no eos_id, and every text ends with it; set it in the model's config",
    )
    length = row_length(cfg)
    require(
        length <= model_config.max_length,
        f"rows of {length} tokens do not fit the model's {model_config.max_length} positions; "
        "shorten them or raise max_length",
    )
    return _open_rows(task, model_config, tokenizer, held_out), tokenizer


def row_length(cfg: Data) -> int:
    """Tokens of a row of training data; no file is read."""
    if isinstance(cfg, TextData | CorpusData):
        return cfg.length
    task = ArithmeticTask(cfg) if isinstance(cfg, ArithmeticData) else cfg
    return task.prompt_length + task.answer_length


def may_pad_rows(cfg: Data) -> bool:
    """Whether rows of training data may have padding; no file is read."""
    if isinstance(cfg, TextData | CorpusData):
        return cfg.random_length_prob > 0
    return not isinstance(cfg, ArithmeticData)


def load_data_tokenizer(
    cfg: Data, model_folder: str = "", load: Callable[[str], Tokenizer] = load_tokenizer
) -> Tokenizer:
    """Loads the tokenizer that the data names, else the model's, else that of a prepared corpus.

    The procedural task has its own tokenizer.

    Args:
      load: loads a tokenizer from a file or folder.

    Raises: InputError if there is none, or the corpus is not prepared.
    """
    if isinstance(cfg, ArithmeticData):
        return ArithmeticTask(cfg).tokenizer
    paths = [path for path in (cfg.tokenizer, model_folder) if path]
    if isinstance(cfg, CorpusData):
        read_manifest(cfg)  # "not prepared" comes before "no tokenizer"
        paths.append(cfg.folder)
    if not cfg.tokenizer:
        paths = [path for path in paths if has_tokenizer(path)] or paths
    return load(paths[0] if paths else "")


def tokenizer_descriptions(cfg: Data) -> list[Path]:
    """Files in the tokenizer's folder that say more: the names of special tokens, the template.

    They belong to the tokenizer.json of a model that is trained on this data.
    """
    path = "" if isinstance(cfg, ArithmeticData) else cfg.tokenizer
    names = ("tokenizer_config.json", "chat_template.jinja")
    folder = Path(path).expanduser()
    files = [*(folder / name for name in names), *sorted((folder / CHAT_TEMPLATES).glob("*.jinja"))]
    return [file for file in files if path and file.is_file()]


def _open_rows(
    task: ArithmeticTask | Data, model_config: ModelConfig, tokenizer: Tokenizer, held_out: bool
) -> TrainingData:
    if isinstance(task, ArithmeticTask):
        return task.held_out_rows if held_out else task.training_rows
    if isinstance(task, CorpusData):
        return load_corpus(task, model_config.eos_id, tokenizer)
    if isinstance(task, TextData):
        return pack_text(task, model_config.eos_id, model_config.mask_id, tokenizer)
    return load_task_rows(task, model_config, tokenizer)
