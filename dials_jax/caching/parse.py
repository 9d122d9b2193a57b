"""Caches by name, as in reports, on command lines of benchmarks, and in tasks of older versions."""

from __future__ import annotations

from dataclasses import MISSING, asdict, fields, is_dataclass

from dials_jax.caching.cache import Cache
from dials_jax.caching.early_skip.settings import EarlySkip
from dials_jax.caching.plain import DualCache, NoCache, PrefixCache
from dials_jax.config import shown, typed
from dials_jax.errors import nearest, require


@typed
def parse_cache(text: str) -> Cache | None:
    """`none`, `prefix`, `dual`, or `es-PROMPT-BLOCK`, as in `es-64-4`."""
    name, *numbers = text.split("-")
    if name == "es":
        require(
            len(numbers) == 2 and all(n.isdecimal() and len(n) < 10 for n in numbers),
            f"cache {shown(text)}: give es-PROMPT-BLOCK, as in es-64-4",
        )
        return EarlySkip(prompt_every=int(numbers[0]), block_every=int(numbers[1]))
    caches = {"none": None, "prefix": PrefixCache(), "dual": DualCache()}
    require(
        text in caches, f"cache {shown(text)} is not known{nearest(text, [*caches, 'es-64-4'])}"
    )
    return caches[text]


def cache_name(cache: Cache | None) -> str:
    """`none`, `prefix`, `dual`, or `es-PROMPT-BLOCK`, and the other settings that are no default.

    A cache of one's own is called by its `name`, or else by its class, with its settings.
    """
    if cache is None:
        return "none"
    own = getattr(cache, "name", type(cache).__name__)
    name = {NoCache: "none", PrefixCache: "prefix", DualCache: "dual"}.get(type(cache), own)
    settings = asdict(cache) if is_dataclass(cache) else {}
    frequencies = {}
    if type(cache) is EarlySkip:
        name = f"es-{cache.prompt_every}-{cache.block_every}"
        frequencies = {x: settings[x] for x in ("prompt_every", "block_every")}
    known = [x for x in fields(cache) if x.default is not MISSING] if settings else []
    default = frequencies | {x.name: x.default for x in known if x.name not in frequencies}
    others = [f"{x} {value}" for x, value in settings.items() if value != default.get(x)]
    return ", ".join([name, *others])
