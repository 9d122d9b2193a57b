"""Caches by name, as in reports, on command lines of benchmarks, and in tasks of older versions."""

from __future__ import annotations

from dataclasses import asdict

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
    """`none`, `prefix`, `dual`, or `es-PROMPT-BLOCK` and the other settings that are no default.

    A cache of one's own is called by its `name`, if it has one, or else by its class.
    """
    if cache is None:
        return "none"
    if not isinstance(cache, EarlySkip):
        known = {NoCache: "none", PrefixCache: "prefix", DualCache: "dual"}
        own = getattr(cache, "name", type(cache).__name__)
        return known.get(type(cache), own)
    frequencies = {"prompt_every": cache.prompt_every, "block_every": cache.block_every}
    settings, default = asdict(cache), asdict(EarlySkip(**frequencies))
    others = [f"{name} {x}" for name, x in settings.items() if x != default[name]]
    return ", ".join([f"es-{cache.prompt_every}-{cache.block_every}", *others])
