"""Caches by name, as command lines of benchmarks and stored tasks of older versions give them."""

from __future__ import annotations

from dials_jax.caching.cache import Cache
from dials_jax.caching.early_skip.settings import EarlySkip
from dials_jax.caching.plain import DualCache, PrefixCache
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
