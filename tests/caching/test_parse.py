import dataclasses
import json

import pytest

from dials_jax.caching.early_skip.settings import EarlySkip
from dials_jax.caching.parse import cache_name, parse_cache
from dials_jax.caching.plain import DualCache, NoCache, PrefixCache
from dials_jax.config import from_dict, to_dict
from dials_jax.errors import InputError
from tests.caching.cases import CACHES


def test_a_cache_of_ones_own_has_a_name():
    class Own(DualCache):
        pass

    class Named(DualCache):
        name = "mine"

    assert cache_name(NoCache()) == "none"

    @dataclasses.dataclass(frozen=True)
    class Set(EarlySkip):
        boost: float = 0.0

    assert (cache_name(Own()), cache_name(Named())) == ("Own", "mine")
    assert cache_name(Set()) == "Set" and cache_name(Set(boost=0.5)) == "Set, boost 0.5"


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


@pytest.mark.parametrize("name", CACHES)
def test_every_cache_is_a_value_of_a_configuration(name):
    cache = CACHES[name]
    assert from_dict(type(cache), to_dict(cache)) == cache and hash(cache) is not None


def test_all_settings_of_early_skip_are_kept_in_json():
    cache = EarlySkip((1.0, 0.6), (0.0, 0.3), 0.7, 32, 8, "query")
    assert from_dict(EarlySkip, json.loads(json.dumps(to_dict(cache)))) == cache
    defaults = EarlySkip()
    for field in dataclasses.fields(EarlySkip):  # or a lost field would not be seen
        assert getattr(cache, field.name) != getattr(defaults, field.name)
