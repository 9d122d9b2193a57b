import pytest

from dials_jax.caching.early_skip.settings import EarlySkip
from dials_jax.caching.parse import parse_cache
from dials_jax.caching.plain import DualCache, PrefixCache
from dials_jax.errors import InputError


def test_names_of_caches():
    assert parse_cache("none") is None
    assert parse_cache("prefix") == PrefixCache() and parse_cache("dual") == DualCache()
    assert parse_cache("es-32-8") == EarlySkip(prompt_every=32, block_every=8)


@pytest.mark.parametrize(
    "text, message",
    [
        ("duel", "cache 'duel' is not known; did you mean 'dual'?"),
        ("", "cache '' is not known; valid names"),
        ("es", "'es': give es-PROMPT-BLOCK, as in es-64-4"),
        ("es-64-x", "'es-64-x': give es-PROMPT-BLOCK"),
        ("es-0-4", "prompt_every=0 must be positive"),
    ],
)
def test_other_names_are_refused_in_one_line(text, message):
    with pytest.raises(InputError) as error:
        parse_cache(text)
    assert message in str(error.value) and "\n" not in str(error.value)
