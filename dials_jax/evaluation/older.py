"""Tasks as earlier versions stored them, with the settings of sampler and cache as their fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dials_jax.caching.parse import parse_cache
from dials_jax.config import from_dict
from dials_jax.evaluation.items import Item
from dials_jax.evaluation.task import EvalTask
from dials_jax.sampling.confidence import Confidence
from dials_jax.sampling.dream import Dream

_LENGTH = {"confidence": "gen_length", "dream": "max_new_tokens"}  # what each calls its length


def task_of(stored: Mapping[str, Any], answer_length: int | None, where: str = "") -> EvalTask:
    """A task as any version stored it.

    Args:
      answer_length: tokens that a sampler without `gen_length` generates.
      where: what messages begin with.

    Raises: InputError for what no version stored.
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
            pass  # of items that are not known, nor are its texts
        elif kind == "dream":
            own = {name: x for name, x in old.items() if x is not None}
            values["sampler"] = Dream(length, **_known(own, Dream))
        else:
            own = _known(old, Confidence)
            values["sampler"] = Confidence(length, cfg_scale=guidance, **own)
    return from_dict(EvalTask, values, where)


def _known(settings: Mapping[str, Any], cls: type) -> dict[str, Any]:
    """Of the settings that all samplers shared, those of one; the others were at their defaults."""
    return {name: x for name, x in settings.items() if name in cls.__dataclass_fields__}


def length_of(generation: Mapping[str, Any]) -> int | None:
    """Tokens that a sampler generates, by `generation_facts`."""
    return generation.get(_LENGTH.get(generation.get("sampler"), ""))


def stored_answer_length(stored: Mapping[str, Any], items: Sequence[Item]) -> int | None:
    """What a task generates by default. Args: items: those of the task; empty where unknown."""
    longest = max((len(item.answers[0]) for item in items), default=None)
    return stored.get("data", {}).get("answer_length") or longest
