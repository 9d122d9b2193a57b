"""Where a generated text ends: at an end of text or of turn, or at a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from dials_jax.caching.cache import Cache
from dials_jax.config import ModelConfig
from dials_jax.data.tokenizer import Tokenizer
from dials_jax.models.model import Model
from dials_jax.sampling.refill import may_end_early, why_not_refilled
from dials_jax.sampling.sampler import Sampler


class Stop(NamedTuple):
    """Strings that end a text, and the tokenizer that finds them."""

    until: tuple[str, ...]
    tokenizer: Tokenizer

    def is_done(
        self, model: Model, sampler: Sampler, cache: Cache | None
    ) -> Callable[[int, Int[np.ndarray, "G"]], bool] | None:
        """What ends a sequence early, as `generation_batches` takes it.

        None: nothing does. There are no strings, or the settings let no sequence end early: then
        the sampler's `stop_at_eos` is off, or sequences cannot make room for others.
        """
        if not (self.until and may_end_early(sampler)) or why_not_refilled(
            sampler, cache, model.config, model.batch_invariant
        ):
            return None
        return lambda _, ids: is_ended(ids.tolist(), self.tokenizer, model.config, self.until)


def is_ended(
    ids: Sequence[int], tokenizer: Tokenizer, cfg: ModelConfig, until: Sequence[str]
) -> bool:
    """Whether more tokens after `ids` would change nothing of the text up to its stop string."""
    text = decode_to_end(ids, tokenizer, cfg, until)
    half_written = (stop[:n] for stop in until for n in range(1, len(stop)))
    stopped = any(stop in text for stop in until) and not any(map(text.endswith, half_written))
    return stopped or cut_tokens(ids, end_ids(tokenizer, cfg, until)) != list(ids)


def decode_to_end(
    ids: Sequence[int], tokenizer: Tokenizer, cfg: ModelConfig, until: Sequence[str]
) -> str:
    """Decodes the tokens before the first end of text or end of turn.

    A stop string that is a single token ends a text, too: special tokens may not be decoded.
    """
    return tokenizer.decode(cut_tokens(ids, end_ids(tokenizer, cfg, until)))


def end_ids(tokenizer: Tokenizer, cfg: ModelConfig, until: Sequence[str]) -> list[int | None]:
    """The tokens that end a text; None for those that there are not."""
    return [cfg.eos_id, cfg.eot_id, *map(tokenizer.token_to_id, until)]


def cut_tokens(ids: Sequence[int], ends: Sequence[int | None]) -> list[int]:
    """Cuts tokens before the first that is one of `ends`."""
    return list(ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))])


def cut_at_stop(text: str, until: Sequence[str]) -> str:
    """Cuts a text before the first of the stop strings; returns all of it if there is none."""
    return text[: min((text.find(stop) for stop in until if stop in text), default=len(text))]


def tokens_of(text: str, ids: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """The fewest of the tokens, from the first, whose text begins with `text`, which they decode to
    or to more."""
    for count in range(len(ids)):
        if tokenizer.decode(ids[:count]).startswith(text):
            return list(ids[:count])
    return list(ids)
