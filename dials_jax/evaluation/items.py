"""Loads the items of an evaluation task: tokenised prompts with their answers."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from dials_jax.config import ArithmeticData, CorpusData, ModelConfig, TaskData, TextData
from dials_jax.data.arithmetic import ArithmeticTask
from dials_jax.data.corpus import load_corpus
from dials_jax.data.questions import (
    Question,
    fill_template,
    is_choice,
    make_question,
    read_questions,
)
from dials_jax.data.records import get_field, prefix_errors
from dials_jax.data.tasks import part_fits, require_no_mask_token, warn_dropped
from dials_jax.data.text import pack_text
from dials_jax.data.tokenizer import Ids, Tokenizer, check_tokenizer, encode_pair
from dials_jax.errors import require
from dials_jax.evaluation.batched import request_hash
from dials_jax.evaluation.exact_match import check_reference, normalise_answer
from dials_jax.evaluation.task import EvalTask

OUTPUT = "\0"  # where a program takes the generated text; Python's source has no such character
NUM_ARITHMETIC = 1000  # test items of the procedural task if the task sets no limit


@dataclass(frozen=True)
class Item:
    """One question: one answer for generation and the NELBO, several for multiple choice."""

    prompt: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    label: int  # index of the right answer
    reference: str  # text that exact match compares with
    program: str  # what metric "code" executes, with `OUTPUT` for the generated text
    group: str  # value of the field `EvalTask.mean_over`
    characters: tuple[int, ...]  # of each answer's text (choice)
    key: int  # `request_hash` of prompt and answers: random keys do not depend on the order


class Items(list[Item]):
    """The items of a task.

    Attributes:
      num_dropped: items that were read but left out because they are too long.
    """

    num_dropped: int = 0


def make_item(
    prompt: Ids,
    answers: Sequence[Ids],
    label: int = 0,
    reference: str = "",
    program: str = "",
    group: str = "",
) -> Item:
    """Makes an item; its key is the hash of prompt and answers."""
    prompt = tuple(map(int, prompt))
    answers = tuple(tuple(map(int, answer)) for answer in answers)
    key = request_hash((prompt, answers))
    return Item(prompt, answers, label, reference, program, group, (), key)


def item_names(items: Sequence[Item]) -> list[str]:
    """The names that scores are stored under: the key, with a number if an item is repeated."""
    seen: Counter[int] = Counter()
    names = []
    for item in items:
        names.append(f"{item.key}-{seen[item.key]}" if seen[item.key] else str(item.key))
        seen[item.key] += 1
    return names


def items_digest(items: Sequence[Item]) -> str:
    """A digest of the items, their labels and references, in their order.

    Programs do not count: they are rules by which outputs are scored.
    """
    content = [(item.prompt, item.answers, item.label, item.reference) for item in items]
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def load_items(
    task: EvalTask,
    tokenizer: Tokenizer | None,
    model_config: ModelConfig,
    held_out: bool = True,
) -> Items:
    """Reads the items of one task, at most `task.limit` of them.

    Args:
      tokenizer: from `sources.load_data_tokenizer`; may be None for the procedural task, which has
        its own.
      held_out: False reads training items of the procedural task. Other data names its items.

    Raises: InputError, with file and line, for a missing field, a label that names no choice,
      choices that are equal or only one, a prompt or an answer that is too long (unless
      `too_long="drop"`) or contains the mask token; and if no item is left.
    """
    if isinstance(task.data, ArithmeticData):
        tokenizer = ArithmeticTask(task.data).tokenizer
    require(tokenizer is not None, f"task {task.name!r} needs the model's tokenizer; pass it")
    check_tokenizer(tokenizer, model_config)
    if isinstance(task.data, TextData | CorpusData):
        return _text_items(task, task.data, tokenizer, model_config)
    cfg, questions = _questions(task, held_out)
    items = Items()
    for where, question in islice(questions, task.limit):
        with prefix_errors(where):
            item = _encode_question(task, question, tokenizer, model_config.eos_id)
        for what, ids in (("prompt", item.prompt), *(("answer", a) for a in item.answers)):
            require_no_mask_token(where, what, ids, model_config.mask_id)
        longest = _longest_answer(task, item, tokenizer)
        if part_fits(cfg, where, "prompt", len(item.prompt)) and part_fits(
            cfg, where, "answer", longest
        ):
            items.append(item)
        else:
            items.num_dropped += 1
    warn_dropped(items.num_dropped, items.num_dropped + len(items))
    require(bool(items), f"task {task.name!r} has no items; add records or raise limit")
    return items


def _questions(task: EvalTask, held_out: bool) -> tuple[TaskData, Iterator[tuple[str, Question]]]:
    """The settings of a task's data, and its (where, question) pairs."""
    if isinstance(task.data, TaskData):
        cfg = task.question_data()
        if task.metric != "choice" and cfg.answer != TaskData.answer:
            cfg = replace(cfg, choices=(), choice_list="")  # an answer of its own
        _require_choices(task, cfg)
        return cfg, read_questions(cfg)
    procedural = ArithmeticTask(task.data)
    limit = NUM_ARITHMETIC if task.limit is None else task.limit
    records = islice(procedural.records(held_out), limit)
    cfg = TaskData(prompt_length=procedural.prompt_length, choices=task.choices, label=task.label)
    _require_choices(task, cfg)
    return cfg, ((record["prompt"], make_question(cfg, record)) for record in records)


def _require_choices(task: EvalTask, cfg: TaskData) -> None:
    require(
        task.metric != "choice" or is_choice(cfg),
        f"task {task.name!r}: give either choices= (templates) or choice_list= (a field)",
    )


def _encode_question(
    task: EvalTask, question: Question, tokenizer: Tokenizer, eos_id: int | None
) -> Item:
    """Tokenises prompt and answers."""
    prompt, texts, characters, label, record = question
    if task.metric != "choice":
        texts, label = [texts[label]], 0
    reference = "" if task.metric == "choice" else texts[0]
    group = str(get_field(record, task.mean_over)) if task.mean_over else ""
    if task.generates:
        if task.metric == "exact_match":
            check_reference(task, reference)
        # The model sees the prompt alone, so the two are not tokenised together.
        prompt_ids, answer_ids = tokenizer.encode_batch([prompt, reference])
        answer_ids += [] if eos_id is None else [eos_id]
        program = _fill_program(task, record)
        return make_item(prompt_ids, [answer_ids], label, reference, program, group)
    pairs = [encode_pair(tokenizer, prompt, text) for text in texts]
    answers = [answer_ids for _, answer_ids in pairs]
    require(all(answers), f"an answer of {texts} has no tokens; correct the template")
    require(
        len(set(map(tuple, answers))) == len(answers),
        f"the choices {texts} have the same tokens; correct the record or choices=",
    )
    item = make_item(pairs[0][0], answers, label, reference, group=group)
    return replace(item, characters=tuple(characters))


def _fill_program(task: EvalTask, record: dict[str, Any]) -> str:
    if task.metric != "code":
        return ""
    require(
        "output" not in record,
        "field 'output' has the name of the generated text in program=; rename the field",
    )
    return fill_template(task.program, record | {"output": OUTPUT})


def _longest_answer(task: EvalTask, item: Item, tokenizer: Tokenizer) -> int:
    """The number of tokens that must fit: those that are scored, or that a right output must have.

    If `extract` takes the answer from a longer reference, only that part has to fit, because the
    model need not write the rest. No metric needs an end of text after the answer.
    """
    if task.metric == "code":
        return 0  # another program than the reference may be right
    if task.metric != "exact_match":
        return max(map(len, item.answers))
    text = item.reference
    if task.extract:
        text = normalise_answer(text, task.extract, task.match)
    return len(tokenizer.encode(text))


def _text_items(
    task: EvalTask,
    cfg: TextData | CorpusData,
    tokenizer: Tokenizer,
    model_config: ModelConfig,
) -> Items:
    """Makes an item of each row of text, packed as in training; its first tokens are the prompt."""
    require(
        task.metric == "nelbo",
        f"task {task.name!r}: metric {task.metric!r} needs prompts and answers; use metric "
        "'nelbo' or data of kind 'task'",
    )
    require(
        0 < cfg.prompt_length < cfg.length,
        f"task {task.name!r}: prompt_length={cfg.prompt_length} must lie between 0 and "
        f"length={cfg.length}",
    )
    if isinstance(cfg, CorpusData):
        data = load_corpus(cfg, model_config.eos_id, tokenizer)
    else:
        data = pack_text(cfg, model_config.eos_id, model_config.mask_id, tokenizer)
    count = data.num_rows if task.limit is None else min(task.limit, data.num_rows)
    rows = data.rows(np.arange(count))[0].tolist()
    require(bool(rows), f"task {task.name!r} has no items; raise limit")
    start = cfg.prompt_length
    return Items(make_item(row[:start], [row[start:]]) for row in rows)
