"""Answers in a file of JSON lines, each written as soon as it is there.

    {"number": 2, "prompt": "1 + 1 =", "text": " 2", "num_tokens": 2, "ended": true, "passes": 2,
     "layers_run": 0.83, "seconds": 0.04, "settings": "9f3c1ab2e4d5a607", "digest": "..."}

`number` counts the prompts from 0; the lines come in the order in which answers end. `settings` is
the digest of everything that answers depend on, which is in `NAME.settings.json` beside the file. A
run that was killed continues with the prompts that have no line; under other settings, or with
other prompts, the file is refused.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dials_jax.config import shown
from dials_jax.errors import require
from dials_jax.evaluation.answer_store import (
    AnswerSettings,
    AnswerStore,
    digest_text,
    plain_settings,
)
from dials_jax.files import file_to_write
from dials_jax.records import Records, require_numbers, require_texts
from dials_jax.text import GeneratedText, Prompt, TextJob
from dials_jax.workdir import differences, exclusive, require_unclaimed


class AnswerFile:
    """The answers so far, and the numbers of the prompts without one.

    Attributes:
      remaining: numbers of the prompts to answer.
    """

    def __init__(self, records: Records, prompts: Sequence[Prompt], job: TextJob):
        """Raises: InputError if the file answers other prompts."""
        self._records, self._prompts, self._job = records, list(prompts), job
        self._settings = settings_digest(records.identity)
        done = set()
        for record in records.all:
            number = record["number"]
            known = number < len(prompts) and record["prompt"] == prompts[number]
            require(
                known,
                f"{records.path} answers {shown(record['prompt'])} as prompt {number}, which is "
                "another now; choose another --out",
            )
            chat = self._facts(number).get("chat")
            require(
                record.get("chat", chat) == chat,
                f"{records.path} answers prompt {number} {'with' if chat is False else 'without'} "
                "the chat template, unlike now; choose another --out",
            )
            done.add(number)
        self.remaining = [i for i in range(len(prompts)) if i not in done]

    def _facts(self, number: int) -> dict[str, bool]:
        """Whether a prompt went through the chat template, where some of the prompts did."""
        text = isinstance(self._prompts[number], str)
        return {} if self._job.template is None else {"chat": self._job.chat or not text}

    def add(self, number: int, answer: GeneratedText) -> dict[str, Any]:
        """Writes an answer; returns its line."""
        record: dict[str, Any] = {
            "number": number,
            "prompt": self._prompts[number],
            "text": answer.text,
            "num_tokens": len(answer.tokens),
            "ended": answer.ended,
            "passes": answer.passes,
            "layers_run": answer.layers_run,
            "seconds": answer.seconds,
        }
        if answer.log_probs is not None:
            record |= {"tokens": answer.tokens.tolist(), "log_probs": answer.log_probs.tolist()}
        record |= self._facts(number)
        self._records.add(record | {"settings": self._settings})
        return record


@contextlib.contextmanager
def open_answers(path: str | Path, job: TextJob, prompts: Sequence[Prompt]) -> Iterator[AnswerFile]:
    """Opens a file to continue, or to begin; no other process may write it meanwhile.

    Args:
      prompts: as they were given, before the chat template; JSON values.

    Raises: InputError if the file was written under other settings, or is none of this kind.
    """
    file = file_to_write(path, "--out", "answers.jsonl")
    mark = f"{file.stem}.settings.json"

    def agree(old: Mapping[str, Any], new: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
        names = ", ".join(differences(old, new))
        require(
            not names,
            f"{file} has answers under other settings ({names}), which {mark} states; choose "
            "another --out",
        )
        return new

    with exclusive(file.parent, "--out", f".{file.name}.lock") as folder:
        require_unclaimed(folder, mark, (file.name,))
        records = Records(folder, identity_of(job), _check, mark, agree, name=file.name)
        yield AnswerFile(records, prompts, job)


def identity_of(job: TextJob) -> dict[str, Any]:
    """Everything that answers depend on, except the prompts."""
    settings = AnswerSettings(cache=job.cache, seed=job.seed)
    return AnswerStore(job.model, job.policy, settings, None).identity | {
        "sampler": plain_settings(job.sampler),
        "max_new_tokens": job.length,
        "log_probs": job.log_probs,
        "tokenizer": job.reader.tokenizer.fingerprint,
        "template": job.template and digest_text(job.template)[:16],
        **({"stop": sorted(job.stop)} if job.stop else {}),  # files of earlier versions have none
    }


def settings_digest(identity: Mapping[str, Any]) -> str:
    return digest_text(json.dumps(identity, sort_keys=True))[:16]


def _check(record: Any) -> None:
    require_texts(record["text"], record["settings"])
    require_numbers([record[name] for name in ("number", "passes", "layers_run", "seconds")], 4)
    if type(record["number"]) is not int or record["number"] < 0:
        raise ValueError(f"number {record['number']!r}")
