"""The prompts that choose the layers of static policies: those of training, not the test items."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dials_jax.config import ArithmeticData, CorpusData, TaskData, TextData
from dials_jax.data.record_files import read_task_records
from dials_jax.data.records import get_field
from dials_jax.data.sources import load_data_tokenizer
from dials_jax.data.tokenizer import Tokenizer
from dials_jax.errors import require
from dials_jax.evaluation.items import Item, load_items
from dials_jax.evaluation.task import EvalConfig, EvalTask
from dials_jax.models.model import Model


@dataclass(frozen=True)
class CalibrationPrompts:
    """The items of one task whose prompts Goel, Algorithm 1 looks at."""

    items: Sequence[Item]
    source: str  # what they are, for the report
    of_test: bool = False  # they are test items


def load_calibration(
    cfg: EvalConfig, task: EvalTask, items: Sequence[Item], tokenizer: Tokenizer, model: Model
) -> CalibrationPrompts:
    """The calibration prompts of a task: those of `cfg.calibration`, else of its training data.

    A task that names no training data is calibrated on its first test prompts, which the report
    says.

    Args:
      items: of the task.
      tokenizer: of the task's data.

    Raises: InputError if all prompts are empty, and those of `load_items`.
    """
    count = cfg.num_calibration
    if cfg.calibration is not None:
        # Of records exact match takes whole answers, from any model; rows of text have the NELBO.
        metric = "nelbo" if isinstance(cfg.calibration, TextData | CorpusData) else "exact_match"
        data = EvalTask(name="calibration", metric=metric, data=cfg.calibration, limit=count)
        own = load_data_tokenizer(cfg.calibration, model.path)
        chosen = load_items(data, own, model.config, held_out=False)
        found = CalibrationPrompts(chosen, f"the first {len(chosen)} prompts of calibration=")
    elif (training := _training_task(task)) is not None:
        chosen = load_items(replace(training, limit=count), tokenizer, model.config, held_out=False)
        found = CalibrationPrompts(chosen, f"the first {len(chosen)} prompts of its training data")
    else:
        chosen = items[:count]
        source = f"its first {len(chosen)} test prompts, because it names no training data"
        found = CalibrationPrompts(chosen, f"{source}; set calibration= to others", of_test=True)
    require(
        any(item.prompt for item in found.items),
        f"task {task.name!r} has empty prompts, but Goel, Algorithm 1 chooses static "
        "layers by prompts; set num_static=() or calibration=",
    )
    return found


def _training_task(task: EvalTask) -> EvalTask | None:
    """The same task on the training data that it names; None if it names none."""
    data = task.data
    if isinstance(data, ArithmeticData):
        return task
    if isinstance(data, CorpusData) and data.split != "train":
        return replace(task, data=replace(data, split="train"))
    if isinstance(data, TaskData) and data.few_shot is not None:
        paths = (data.few_shot[0],)  # the examples come from the training split
        return replace(task, data=replace(_with_fewer_examples(data), paths=paths, too_long="drop"))
    return None


def _with_fewer_examples(data: TaskData) -> TaskData:
    """As many few-shot examples as a record of their own file has others, at most those asked for.

    A file may hold just the examples, as MMLU's does for every subject; then it is one fewer.
    """
    path, number = data.few_shot
    groups = Counter(
        get_field(record, data.few_shot_by) if data.few_shot_by else None
        for _, record in read_task_records((path,))
    )
    number = min(number, *(count - 1 for count in groups.values()))
    if number < 1:
        return replace(data, few_shot=None, few_shot_by="")
    return replace(data, few_shot=(path, number))
