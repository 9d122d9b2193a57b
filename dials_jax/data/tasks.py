"""Prompt/answer tasks: rows of a prompt and its answer.

A row is `padding prompt | answer EOS fill`. In all rows the answer begins at the same position, and
only positions from there on may be masked.
"""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dials_jax.config import ModelConfig, TaskData
from dials_jax.data.batches import Indices, RowArrays
from dials_jax.data.questions import is_choice, read_questions
from dials_jax.data.tokenizer import (
    Ids,
    Tokenizer,
    check_tokenizer,
    encode_pair,
    load_tokenizer,
)
from dials_jax.errors import require

Pair = tuple[Ids, Ids]  # token ids of a prompt and its answer


@dataclass(frozen=True, eq=False)
class TaskRows:
    """Prompt/answer pairs as rows of `prompt_length + answer_length` tokens (a TrainingData).

    Attributes:
      pad_answer: pad the answer with EOS and train on the padding, so that the model learns to stop
        (LLaDA, section 2.3). Otherwise the padding is not valid.
    """

    pairs: Sequence[Pair]
    prompt_length: int
    answer_length: int
    eos_id: int
    pad_id: int
    pad_answer: bool = True

    @property
    def num_rows(self) -> int:
        return len(self.pairs)

    @functools.cached_property
    def fingerprint(self) -> str:
        layout = self.prompt_length, self.answer_length, self.eos_id, self.pad_id, self.pad_answer
        digest = hashlib.sha256(repr(layout).encode())
        for prompt, answer in self.pairs:
            digest.update(repr([*map(int, prompt), -1, *map(int, answer)]).encode())
        return digest.hexdigest()[:16]

    def rows(self, indices: Indices) -> RowArrays:
        """Returns (tokens, answer, valid). The EOS after an answer is part of the answer."""
        shape = (len(indices), self.prompt_length + self.answer_length)
        tokens = np.full(shape, self.pad_id, np.int32)
        tokens[:, self.prompt_length :] = self.eos_id
        valid = np.zeros(shape, bool)
        for row, index in enumerate(indices):
            prompt, answer = self.pairs[index]
            start, end = self.prompt_length - len(prompt), self.prompt_length + len(answer)
            tokens[row, start : self.prompt_length] = prompt
            tokens[row, self.prompt_length : end] = answer
            valid[row, start : shape[1] if self.pad_answer else end + 1] = True
        return tokens, valid & (np.arange(shape[1]) >= self.prompt_length), valid


def load_task_rows(
    cfg: TaskData, model_config: ModelConfig, tokenizer: Tokenizer | None = None
) -> TaskRows:
    """Reads and tokenises the prompt/answer pairs of `cfg.paths` for training.

    As in evaluation, prompt and answer are tokenised separately, since generation has only the
    prompt; a question of multiple choice and its right choice are tokenised together.

    Args:
      tokenizer: None: the one at `cfg.tokenizer`.

    Raises: InputError, with file and line, for a field that is missing, a pair that is too long
      (unless `too_long="drop"`) or one that contains the mask token; and if no pair is left.
    """
    tokenizer = tokenizer or load_tokenizer(cfg.tokenizer)
    check_tokenizer(tokenizer, model_config)
    require(
        not is_choice(cfg) or cfg.answer == TaskData.answer,
        f"answer={cfg.answer!r} and choices are both given, so it is not clear what to train on; "
        "leave out one of them",
    )
    locations, texts = [], []
    for where, question in read_questions(cfg):
        texts += [question.prompt, question.answers[question.label]]
        locations.append(where)
    pairs = _encode(cfg, tokenizer, texts)
    for where, pair in zip(locations, pairs, strict=True):
        for what, part in zip(("prompt", "answer"), pair, strict=True):
            require_no_mask_token(where, what, part, model_config.mask_id)
    kept = [
        (prompt, answer)
        for where, (prompt, answer) in zip(locations, pairs, strict=True)
        if part_fits(cfg, where, "prompt", len(prompt))
        and part_fits(cfg, where, "answer", len(answer) + 1)  # its EOS counts
    ]
    warn_dropped(len(pairs) - len(kept), len(pairs))
    require(bool(kept), f"{', '.join(cfg.paths)}: no prompt/answer pair; add records")
    return TaskRows(
        pairs=kept,
        prompt_length=cfg.prompt_length,
        answer_length=cfg.answer_length,
        eos_id=model_config.eos_id,
        pad_id=model_config.pad_id,
        pad_answer=cfg.pad_answer,
    )


def _encode(cfg: TaskData, tokenizer: Tokenizer, texts: list[str]) -> list[Pair]:
    """Tokenises prompts and answers, which alternate in `texts`."""
    if is_choice(cfg):
        ids = [
            part
            for prompt, answer in zip(texts[::2], texts[1::2], strict=True)
            for part in encode_pair(tokenizer, prompt, answer)
        ]
    else:
        ids = tokenizer.encode_batch(texts)
    ids = [np.asarray(i, np.int32) for i in ids]
    return list(zip(ids[::2], ids[1::2], strict=True))


def require_no_mask_token(where: str, what: str, ids: Ids, mask_id: int | None) -> None:
    """Refuses a mask token in the data; the model would take its position for a masked one.

    Args:
      where: file and line, for the message.
      what: "prompt" or "answer".

    Raises: InputError if `ids` holds `mask_id`.
    """
    require(
        mask_id is None or mask_id not in ids,
        f"{where}: the {what} contains [MASK] (id {mask_id}); remove it from the text",
    )


def part_fits(cfg: TaskData, where: str, what: str, num_tokens: int) -> bool:
    """Whether the "prompt" or the "answer" (`what`) of a pair is short enough.

    Raises: InputError if it is not and the configuration does not allow dropping pairs.
    """
    longest = {"prompt": cfg.prompt_length, "answer": cfg.answer_length}[what]
    require(
        num_tokens <= longest or cfg.too_long == "drop",
        f"{where}: the {what} has {num_tokens} tokens but {what}_length={longest}; "
        f'raise {what}_length or set too_long="drop"',
    )
    return num_tokens <= longest


def warn_dropped(num_dropped: int, num_items: int) -> None:
    """Warns if items were left out because they are too long."""
    if num_dropped:
        warnings.warn(f"dropped {num_dropped} of {num_items} items: too long", stacklevel=3)
