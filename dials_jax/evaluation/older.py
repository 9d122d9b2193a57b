"""Reads tasks as earlier versions stored them: with settings of sampler and cache as fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dials_jax.caching.parse import parse_cache
from dials_jax.config import from_dict
from dials_jax.evaluation.items import Item
from dials_jax.evaluation.task import EvalTask
from dials_jax.sampling.confidence import Confidence
from dials_jax.sampling.dream import Dream

_LENGTH_FIELD = {"confidence": "gen_length", "dream": "max_new_tokens"}  # by sampler


def read_task(stored: Mapping[str, Any], answer_length: int | None, where: str = "") -> EvalTask:
    """Reads a task that this or an earlier version stored.

    Args:
      answer_length: tokens to generate if the stored sampler has no `gen_length`.
      where: the beginning of error messages.

    Raises: InputError for settings that no version stored.
    """
    old = {name: x for name, x in stored.items() if name in EvalTask.RENAMED}
    kind, cache = stored.get("sampler"), stored.get("cache")
    if not old and not isinstance(kind, str) and not isinstance(cache, str):
        return from_dict(EvalTask, dict(stored), where)
    values = {name: x for name, x in stored.items() if name not in old} | {"sampler": None}
    values["cache"] = parse_cache(cache) if cache is not None else None
    if stored.get("metric") == "exact_match":
        guidance = values.pop("cfg_scale", 0.0)
        length = old.pop("gen_length", None) or answer_length
        if length is None:
            pass  # the items are not known, so no texts will be generated
        elif kind == "dream":
            given = {name: x for name, x in old.items() if x is not None}
            values["sampler"] = Dream(length, **_fields_of(Dream, given))
        else:
            fields = _fields_of(Confidence, old)
            values["sampler"] = Confidence(length, cfg_scale=guidance, **fields)
    return from_dict(EvalTask, values, where)


def _fields_of(cls: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a sampler has, of those that all shared; the rest had default values."""
    return {name: x for name, x in settings.items() if name in cls.__dataclass_fields__}


def generated_length(generation: Mapping[str, Any]) -> int | None:
    """The number of tokens that a sampler generates, from stored `generation_facts`."""
    return generation.get(_LENGTH_FIELD.get(generation.get("sampler"), ""))


def stored_answer_length(stored: Mapping[str, Any], items: Sequence[Item]) -> int | None:
    """The number of tokens that a stored task generates by default.

    Args:
      items: of the task; empty if they are not known.
    """
    longest = max((len(item.answers[0]) for item in items), default=None)
    return stored.get("data", {}).get("answer_length") or longest
