"""Questions: a record of a task's data as a prompt and its answers, by the templates of `TaskData`.

Training and evaluation read the same questions. So routers are trained on the right choice, and on
prompts with the examples and the spacing that the evaluation has.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from dials_jax.config import TaskData
from dials_jax.data.preparations import PREPARATIONS
from dials_jax.data.record_files import read_task_records
from dials_jax.data.records import get_field, prefix_errors
from dials_jax.errors import require

_FIELD = re.compile(r"\{\{|\}\}|\{([A-Za-z_][\w.]*)\}")


def fill_template(template: str, record: dict[str, Any]) -> str:
    """Replaces every `{name}` by a field of the record.

    `{{` and `}}` become single braces; any other brace is copied.

    Raises: InputError for an unknown field, naming the nearest, and for one that is neither text
      nor a number.
    """

    def value_of(match: re.Match) -> str:
        name = match.group(1)
        if name is None:
            return match.group(0)[0]
        value = get_field(record, name)
        hint = "name one of its entries, or for multiple choice set choice_list and label"
        require(
            isinstance(value, str | int | float),
            f"field {name!r} is {type(value).__name__}, not text; "
            f"{hint if isinstance(value, list) else 'name a field inside it'}",
        )
        return str(value)

    return _FIELD.sub(value_of, template)


class Question(NamedTuple):
    """A record as texts. Prompt and answer joined are the whole text."""

    prompt: str
    answers: list[str]  # of multiple choice all, else one
    characters: list[int]  # of each answer, without the delimiter
    label: int  # index of the right answer
    record: dict[str, Any]


def is_choice(cfg: TaskData) -> bool:
    return bool(cfg.choices or cfg.choice_list)


def read_questions(cfg: TaskData) -> Iterator[tuple[str, Question]]:
    """Yields (where, question) for every record of `cfg.paths`.

    Raises: InputError, with file and line, for a field that is missing, a label that names no
      choice, choices that are equal or only one, or too few few-shot examples.
    """
    examples = _Examples(cfg)
    for where, record in read_task_records(cfg.paths):
        with prefix_errors(where):
            question = make_question(cfg, record)
            shown = examples.before(question.record)
        yield where, question._replace(prompt=shown + question.prompt)


def make_question(cfg: TaskData, record: dict[str, Any]) -> Question:
    """A question without few-shot examples."""
    if cfg.preparation != "none":
        record = record | PREPARATIONS[cfg.preparation](record)
    prompt = fill_template(cfg.prompt, record)
    if is_choice(cfg):
        answers = _choice_texts(cfg, record)
        label = _label_index(cfg, record, len(answers))
    else:
        answers, label = [fill_template(cfg.answer, record)], 0
    spaced = [_delimiter(cfg, prompt, answer) + answer for answer in answers]
    return Question(prompt, spaced, list(map(len, answers)), label, record)


def _delimiter(cfg: TaskData, prompt: str, answer: str) -> str:
    if cfg.target_delimiter is not None:
        return cfg.target_delimiter
    touching = prompt[-1:].strip() and answer[:1].strip()
    return " " if cfg.choice_list and touching else ""


def _choice_texts(cfg: TaskData, record: dict[str, Any]) -> list[str]:
    if cfg.choices:
        texts = [fill_template(template, record) for template in cfg.choices]
    else:
        texts = get_field(record, cfg.choice_list)
        require(
            isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts),
            f"field {cfg.choice_list!r} is {texts!r}; it must be a list of strings",
        )
    require(
        len(set(texts)) == len(texts) > 1,
        f"the choices {texts} must be several, and all different; correct the record or choices=",
    )
    return texts


def _label_index(cfg: TaskData, record: dict[str, Any], num_choices: int) -> int:
    """The index of the right choice, by its name if there are names (ARC has names like "1")."""
    label = get_field(record, cfg.label)
    if cfg.label_names:
        names = get_field(record, cfg.label_names)
        require(
            isinstance(names, list) and len(names) == num_choices and names.count(label) == 1,
            f"field {cfg.label!r} is {label!r}; {cfg.label_names!r} must list it once, among a "
            f"name per choice, but lists {names!r}",
        )
        return names.index(label)
    text = str(label)
    require(
        text.isdecimal(),
        f"field {cfg.label!r} is {label!r}, not an index; name the field that lists the "
        "choices' names in label_names",
    )
    require(
        int(text) < num_choices,
        f"field {cfg.label!r} is {label!r} but there are {num_choices} choices; count from 0",
    )
    return int(text)


class _Examples:
    """The few-shot examples of a task: the first records of a file, or of each group in it."""

    def __init__(self, cfg: TaskData):
        self.cfg = cfg
        self._groups: dict[Any, list[tuple[dict[str, Any], str]]] = {}
        if cfg.few_shot is None:
            return
        path, number = cfg.few_shot
        for where, record in read_task_records((path,)):
            with prefix_errors(where):
                group = self._groups.setdefault(self._group(record), [])
                # One more: a question is not its own example, nor is a copy of it.
                if _num_distinct(group) <= number:
                    question = make_question(cfg, record)
                    text = question.prompt + question.answers[question.label]
                    group.append((question.record, text + cfg.few_shot_delimiter))

    def _group(self, record: dict[str, Any]) -> Any:
        return get_field(record, self.cfg.few_shot_by) if self.cfg.few_shot_by else None

    def before(self, record: dict[str, Any]) -> str:
        """What stands before the question of a record: the description, and the examples."""
        description = fill_template(self.cfg.description, record)
        if self.cfg.few_shot is None:
            return description
        path, number = self.cfg.few_shot
        group = self._groups.get(self._group(record), [])
        others = [text for example, text in group if example != record]
        require(
            len(others) >= number,
            f"{path} has {len(others)} other records for {number} few-shot examples; lower the "
            "number in few_shot, or add records",
        )
        return description + "".join(others[:number])


def _num_distinct(group: list[tuple[dict[str, Any], str]]) -> int:
    records = [record for record, _ in group]
    return sum(record not in records[:i] for i, record in enumerate(records))
