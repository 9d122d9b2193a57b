"""Text in, text out: answers to prompts and conversations of any lengths, and what they cost.

answers = generate_text(model, ["1 + 1 =", "What is a prime?"], max_new_tokens=64, policy=router)
print(answers[0].text, answers[0].passes, answers[0].layers_run)

A `TextJob` yields each answer as soon as it is there; batches, padded lengths and refilling are
those of `evaluation.batched`.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from dials_jax.caching.cache import Cache
from dials_jax.config import ModelConfig, Seed, as_list, shown, typed
from dials_jax.data.chat import Message, choose_template, read_chat_templates, render_chat
from dials_jax.data.tokenizer import Tokenizer, check_tokenizer, load_tokenizer
from dials_jax.errors import InputError, require
from dials_jax.estimates import RunEstimate
from dials_jax.evaluation.batched import (
    GenerationBatch,
    generation_batches,
    request_hash,
    request_keys,
)
from dials_jax.evaluation.request_cost import generation_cost
from dials_jax.evaluation.text_end import Stop, cut_at_stop, cut_tokens, end_ids, tokens_of
from dials_jax.models.model import Model
from dials_jax.nn.policy import Policy
from dials_jax.sampling.requests import refuse_masks
from dials_jax.sampling.sampler import Sampler
from dials_jax.text_sampler import check_lengths, fitting_length, text_sampler

Prompt = str | Sequence[Message]  # a conversation goes through the chat template


@dataclass(frozen=True, repr=False)
class GeneratedText:
    """The answer to one prompt.

    Attributes:
      text: up to the first end of text, end of turn or stop string, which is left out; or all that
        was asked for.
      tokens: those of the text. The last one may hold the beginning of the stop string, too.
      log_probs: in nats, of each token under the model at the step that revealed it, given what was
        known then (`Generation.log_probs`); None unless asked for.
      ended: whether the model said an end, or a stop string.
      passes: model calls until the answer was complete.
      layers_run: share of the layers that ran in them.
      seconds: its share of the time of its batch, without compilation.
    """

    text: str
    tokens: Int[np.ndarray, "n"]
    log_probs: Float[np.ndarray, "n"] | None
    ended: bool
    passes: int
    layers_run: float
    seconds: float

    def __repr__(self) -> str:
        cost = f"{self.passes} passes, {self.layers_run:.1%} of the layers"
        return f"GeneratedText({shown(self.text)}, {len(self.tokens)} tokens, {cost})"


@typed
def generate_text(
    model: Model, prompts: str | Sequence[Prompt], *, max_new_tokens: int | None = None, **settings
) -> list[GeneratedText]:
    """Answers prompts of any lengths, in their order.

    Args:
      prompts: texts to continue, or conversations: lists of {"role": ..., "content": ...}.
      max_new_tokens: at most. None: 256, or fewer if the model has no more positions.
      settings: those of `text_job`.

    Raises: InputError for a prompt that is too long, for chat without a template, and for settings
      that do not compose.
    """
    prompts = as_list(prompts)
    job = text_job(model, prompts, max_new_tokens=max_new_tokens, **settings)
    answers = dict(job.answers())
    return [answers[i] for i in range(len(prompts))]


@typed
def text_job(
    model: Model,
    prompts: str | Sequence[Prompt],
    *,
    max_new_tokens: int | None = None,
    sampler: Sampler | None = None,
    policy: Policy | None = None,
    cache: Cache | None = None,
    chat: bool = False,
    stop: str | tuple[str, ...] = (),
    tokenizer: Tokenizer | str | Path | None = None,
    log_probs: bool = False,
    seed: Seed = 0,
    batch_size: int = 32,
    **settings: Any,
) -> TextJob:
    """Reads prompts, and checks that they can be answered; nothing is compiled yet.

    Args:
      sampler: None: the one of the model's family for `max_new_tokens`; see `text_sampler`.
      policy: which layers run; None runs all.
      chat: put texts into the chat template, as a user's message. Conversations always are.
      stop: strings that end an answer. Where sequences make room for others, an answer ends after
        the block with the first of them, which saves steps and changes no text.
      tokenizer: None: that of the model's folder.
      log_probs: keep those of the tokens.
      settings: of the sampler, such as temperature, steps, block_length or threshold.

    Raises: as `generate_text`.
    """
    require(batch_size > 0, f"batch_size={batch_size} must be positive")
    prompts, stop = as_list(prompts), tuple(as_list(stop))
    require(all(stop), f"stop={stop} has an empty text; remove it")
    reader = open_reader(model.config, model.path, tokenizer)
    is_chat = chat or not all(isinstance(prompt, str) for prompt in prompts)
    ids, sampler, length = encode_prompts(
        reader, prompts, max_new_tokens, sampler, chat, **settings
    )
    template = reader.template if is_chat else None
    return TextJob(
        model, reader, ids, chat, template, sampler, length, policy, cache, stop, log_probs, seed,
        batch_size,
    )  # fmt: skip


def encode_prompts(
    reader: TextReader,
    prompts: Sequence[Prompt],
    max_new_tokens: int | None = None,
    sampler: Sampler | None = None,
    chat: bool = False,
    **settings: Any,
) -> tuple[list[list[int]], Sampler, int]:
    """Prompts as token ids, their sampler, and how many tokens were asked for; needs no weights.

    Args: as those of `text_job`.
    Raises: InputError for prompts without a chat template, and what does not fit the model.
    """
    cfg = reader.cfg
    ids = [reader.tokenizer.encode(text) for text in reader.render(prompts, chat)]
    if sampler is None:
        longest = max(map(len, ids), default=0)
        length = fitting_length(cfg, longest, max_new_tokens, settings.get("block_length"))
        sampler = text_sampler(cfg, length, **settings)
    else:
        given = [*settings, *(["max_new_tokens"] if max_new_tokens is not None else [])]
        require(not given, f"sampler= has its own {' and '.join(given)}; set it there")
        length = sampler.gen_length
    check_lengths(cfg, ids, sampler.gen_length, length)
    refuse_masks(cfg, ids)
    return ids, sampler, length


@dataclass(frozen=True, repr=False)
class TextJob:
    """Prompts that can be answered, and how.

    Attributes:
      prompts: as token ids.
      chat: texts went through the chat template, too, and not conversations alone.
      template: the chat template that they went through; None: none did.
      length: tokens that were asked for; the sampler may generate more, to fill its blocks.
    """

    model: Model
    reader: TextReader
    prompts: list[list[int]]
    chat: bool
    template: str | None
    sampler: Sampler
    length: int
    policy: Policy | None
    cache: Cache | None
    stop: tuple[str, ...]
    log_probs: bool
    seed: int
    batch_size: int

    def __repr__(self) -> str:
        return (
            f"TextJob({len(self.prompts)} prompts, {self.length} new tokens each, {self.sampler})"
        )

    def answers(
        self, remaining: Sequence[int] | None = None
    ) -> Iterator[tuple[int, GeneratedText]]:
        """Yields (number of a prompt, its answer) as soon as the answer is there, in any order.

        An answer depends on its prompt, the settings and the seed, not on the other prompts. A
        prompt that is given several times gets several draws.

        Args:
          remaining: numbers of the prompts to answer; None: all.
        """
        for batch in self.batches(remaining):
            for place, number in enumerate(batch.requests):
                yield number, self.reader.answer(batch, place, self.length, self.stop)

    def cost(self, remaining: Sequence[int] | None = None) -> RunEstimate:
        """What the answers take at most, if every layer runs."""
        numbers = range(len(self.prompts)) if remaining is None else remaining
        lengths = [len(self.prompts[i]) for i in numbers]
        settings = self.sampler, self.cache, self.used_batch_size
        cost = generation_cost(self.model, lengths or [0], *settings)
        return cost._replace(
            tokens=len(lengths) * self.length, flops=cost.flops if lengths else 0.0
        )

    @property
    def used_batch_size(self) -> int:
        """Sequences per batch: no more than there are prompts."""
        return max(1, min(self.batch_size, len(self.prompts)))

    def batches(self, remaining: Sequence[int] | None = None) -> Iterator[GenerationBatch]:
        """Yields batches with all that generation records."""
        stop = Stop(self.stop, self.reader.tokenizer)
        yield from generation_batches(
            self.model,
            self.prompts,
            sampler=self.sampler,
            policy=self.policy,
            cache=self.cache,
            keys=draw_keys(self.seed, self.prompts),
            batch_size=self.used_batch_size,
            remaining=remaining,
            is_done=stop.is_done(self.model, self.sampler, self.cache),
            log_probs=self.log_probs,
        )


# -------------------------------------------------------------------------------- prompts, answers


@dataclass(frozen=True)
class TextReader:
    """A model's tokenizer: prompts as token ids, and generated tokens as answers.

    Attributes:
      folder: has the chat templates.
    """

    cfg: ModelConfig
    tokenizer: Tokenizer
    folder: Path

    def render(self, prompts: Sequence[Prompt], chat: bool = False) -> list[str]:
        """Prompts as texts; conversations, and under `chat` all, by the chat template.

        Raises: InputError for anything else, and if the folder has no template.
        """
        return [self._render(number, prompt, chat) for number, prompt in enumerate(prompts)]

    def _render(self, number: int, prompt: Prompt, chat: bool) -> str:
        if isinstance(prompt, str):
            if not chat:
                return prompt
            prompt = [{"role": "user", "content": prompt}]
        is_chat = isinstance(prompt, list | tuple) and all(
            isinstance(turn, dict)
            and all(isinstance(turn.get(name), str) for name in ("role", "content"))
            for turn in prompt
        )
        require(
            is_chat and len(prompt) > 0,
            f"prompt {number} is {shown(prompt)}; give a text, or a list of "
            "{'role': 'user', 'content': ...}, both of them texts",
        )
        return render_chat(self.template, prompt, self.tokenizer, self.folder)

    @functools.cached_property
    def template(self) -> str:
        """The chat template. Raises: InputError if there is none."""
        return find_template(self.folder)

    def answer(
        self, batch: GenerationBatch, place: int, length: int, stop: Sequence[str] = ()
    ) -> GeneratedText:
        """The answer of one sequence of a batch.

        Args:
          length: tokens that were asked for.
          stop: strings that end it.
        """
        out, ids = batch.out, batch.answers[place, :length].tolist()
        tokens = cut_tokens(ids, end_ids(self.tokenizer, self.cfg, stop))
        whole = self.tokenizer.decode(tokens)
        text = cut_at_stop(whole, stop)
        ended = len(tokens) < len(ids) or text != whole
        if text != whole:
            tokens = tokens_of(text, tokens, self.tokenizer)
        log_probs = None if out.log_probs is None else out.log_probs[place, : len(tokens)]
        return GeneratedText(
            text=text,
            tokens=np.array(tokens, int),
            log_probs=log_probs,
            ended=ended,
            passes=int(out.passes[place]),
            layers_run=float(out.layers_run[place]),
            seconds=out.flops.seconds / len(batch.requests),
        )


def open_reader(
    cfg: ModelConfig, path: str | Path | None, tokenizer: Tokenizer | str | Path | None = None
) -> TextReader:
    """The tokenizer of a model, or another one. Args: path: of the model's folder, if it has one.

    Raises: InputError if there is none, or if it does not fit.
    """
    if not isinstance(tokenizer, Tokenizer):
        where = tokenizer or path
        require(bool(where), "the model was made in memory and has no tokenizer; give tokenizer=")
        folder = Path(where).expanduser()
        tokenizer = load_tokenizer(folder)
        folder = folder.parent if folder.is_file() else folder
    else:
        folder = Path(path or "")
    check_tokenizer(tokenizer, cfg)
    return TextReader(cfg, tokenizer, folder)


def find_template(*folders: Path) -> str:
    """The chat template of the first folder that has one. Raises: InputError if none has."""
    for folder in folders:
        if templates := read_chat_templates(folder):
            return choose_template(templates)
    raise InputError(
        f"{folders[0]} has no chat template, so its model is no chat model; give plain prompts "
        "(without --chat), or put a chat_template.jinja there"
    )


def draw_keys(seed: int, prompts: Sequence[Sequence[int]]) -> jax.Array:
    """One key per prompt, from the seed and its tokens, and other ones for its repetitions."""
    seen: Counter[tuple[int, ...]] = Counter()
    hashes = []
    for ids in map(tuple, prompts):
        hashes.append(request_hash((ids, seen[ids]) if seen[ids] else ids))
        seen[ids] += 1
    return request_keys(seed, hashes)
