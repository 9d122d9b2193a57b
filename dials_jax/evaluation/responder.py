"""Answers the requests of a harness, and keeps every batch of answers as soon as it is computed.

A request is token ids: a prompt to continue, or a pair of prompt and answer to score. Its answer
depends on its ids and on the settings alone, not on the batch or the order of requests. So an
answer that is kept serves every later call with the same settings: the call of a process that was
killed, and another task. What was kept under other settings is never read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dials_jax.data.tasks import Pair
from dials_jax.data.tokenizer import Ids
from dials_jax.errors import require
from dials_jax.estimates import RunEstimate, print_cost
from dials_jax.evaluation.answer_store import (
    BATCHING,
    AnswerSettings,
    AnswerStore,
    digest_text,
    plain_settings,
)
from dials_jax.evaluation.batched import (
    GenerationBatch,
    LikelihoodBatch,
    as_tuple,
    generation_batches,
    likelihood_batches,
    request_hash,
    request_keys,
)
from dials_jax.evaluation.likelihood import WHOLE, num_copies
from dials_jax.evaluation.pairs import check_pairs
from dials_jax.evaluation.request_cost import LOWER_BATCH_SIZE, generation_cost, likelihood_cost
from dials_jax.evaluation.tally import LayerCounts, Record, Tally, make_batch_record
from dials_jax.evaluation.text_end import Stop
from dials_jax.models.model import Model
from dials_jax.nn.policy import Policy
from dials_jax.progress import Pace
from dials_jax.sampling.requests import refuse_masks
from dials_jax.sampling.sampler import Sampler
from dials_jax.sharding import require_same_everywhere
from dials_jax.skipping.flops import Flops

PromptIds = tuple[int, ...]


class Likelihood(NamedTuple):
    """The score of an answer.

    Attributes:
      log_likelihood: nats; a lower bound in expectation, and exact for an answer of one token.
      is_greedy: every token of the answer is the most probable one, in one pass over the prompt
        and an answer that is masked as a whole.
    """

    log_likelihood: float
    is_greedy: bool


class Cost(NamedTuple):
    """What the batches took that hold the answers of one call; kept batches count like new ones."""

    flops: Flops
    num_passes: float  # of the model, per sequence, summed over the requests
    num_requests: int  # different ones


class Responder:
    """A model that answers requests under one policy.

    Attributes:
      num_cut: requests that lost tokens because they were too long.
      costs: of all calls so far, by kind: "likelihood" and "generation".
    """

    def __init__(
        self,
        model: Model,
        policy: Policy | None = None,
        settings: AnswerSettings = AnswerSettings(),
        folder: str | Path | None = None,
        say: Callable[[str], Any] = lambda line: None,
    ):
        """Answers are kept in `folder`; None: in memory only. `say` is told what they take."""
        self.model, self.policy, self.settings = model, policy, settings
        self.store = AnswerStore(model, policy, settings, folder)
        self.num_cut, self.say = 0, say
        self.costs: dict[str, list[Cost]] = {"likelihood": [], "generation": []}

    def likelihoods(
        self, pairs: Sequence[Pair], key_of_answer: bool = False
    ) -> Iterator[tuple[int, Likelihood]]:
        """Yields (index of a pair, its likelihood), each as soon as it is known, in any order.

        Args:
          key_of_answer: draw the masks from a key of prompt and answer. Otherwise from one of the
            prompt, so that the answers of a prompt are compared under the same masks.

        Raises: InputError for a pair that cannot be scored, before anything is computed.
        """
        fitted = [self._fit_pair(*pair) for pair in enumerate(pairs)]
        check_pairs(fitted, self.model.config)  # named by their places here, where some are equal
        cfg, named = self.settings, _Named.of(fitted)
        names, distinct = list(named.requests), list(named.requests.values())
        copies = {
            name: num_copies(self.model.config, len(answer), cfg.num_samples, self.policy)
            for name, (_, answer) in named.requests.items()
        }
        # Of a causal model, and of an answer of one token, one copy is the whole one.
        whole = {
            name
            for name, (_, answer) in named.requests.items()
            if copies[name] == 1 and (self.model.config.causal or len(answer) == 1)
        }

        def records(tally: Tally) -> Iterator[Record]:
            for batch in likelihood_batches(
                self.model,
                distinct,
                num_samples=cfg.num_samples,
                cfg_scale=cfg.cfg_scale,
                policy=self.policy,
                keys=self._keys(distinct if key_of_answer else [pair[0] for pair in distinct]),
                remaining=_remaining_copies(tally, names, whole),
                **self._batching(),
            ):
                yield self._likelihood_record(batch, names, whole)

        def answer(tally: Tally, name: str) -> Likelihood | None:
            if name not in tally.examples or tally.unscored([name])[0].size:
                return None
            return Likelihood(tally.mean(name), tally.examples[name])

        def cost(left: Mapping[str, int]) -> RunEstimate:
            pairs = [(*map(len, named.requests[name]), n) for name, n in left.items()]
            return likelihood_cost(self.model, pairs, cfg.cfg_scale, cfg.batch_size)

        facts = {name: getattr(cfg, name) for name in ("num_samples", "cfg_scale")}
        facts["key_of_answer"] = key_of_answer
        passes = sum(copies.values()) + len(names) - len(whole)
        yield from self._answer(
            "likelihood", facts, named, copies, records, answer, lambda tally: passes, cost
        )

    def generations(
        self,
        prompts: Sequence[Ids],
        sampler: Sampler,
        draws: Sequence[int] | None = None,
        stop: Stop | None = None,
    ) -> Iterator[tuple[int, list[int]]]:
        """Yields (index of a prompt, the generated ids), as soon as they are known, in any order.

        Args:
          draws: per prompt, which of several samples of it to draw; None: the first.
          stop: a text may end at the end of a block that holds one of these; only where the
            sampler's `stop_at_eos` lets sequences end early, and where they make room for others.

        Raises: InputError for a prompt that cannot be answered, before anything is computed.
        """
        room = self.model.config.max_length - sampler.gen_length
        fitted = [self._fit(f"prompt {i}", as_tuple(ids), room) for i, ids in enumerate(prompts)]
        refuse_masks(self.model.config, fitted)  # as with pairs
        named = _Named.of(list(zip(fitted, draws or [0] * len(fitted), strict=True)))
        names, distinct = list(named.requests), list(named.requests.values())
        facts = {"sampler": plain_settings(sampler), "cache": plain_settings(self.settings.cache)}
        is_done = stop.is_done(self.model, sampler, self.settings.cache) if stop else None
        if is_done:
            facts["stop"] = [stop.tokenizer.fingerprint, *sorted(stop.until)]

        def records(tally: Tally) -> Iterator[Record]:
            for batch in generation_batches(
                self.model,
                [prompt for prompt, _ in distinct],
                sampler=sampler,
                policy=self.policy,
                cache=self.settings.cache,
                keys=self._keys([(ids, draw) if draw else ids for ids, draw in distinct]),
                remaining=tally.unscored(names)[0],
                is_done=is_done,
                **self._batching(),
            ):
                yield self._generation_record(batch, names)

        def cost(left: Mapping[str, int]) -> RunEstimate:
            lengths = [len(named.requests[name][0]) for name in left]
            return generation_cost(
                self.model, lengths, sampler, self.settings.cache, self.settings.batch_size
            )

        yield from self._answer(
            "generation",
            facts,
            named,
            dict.fromkeys(names, 1),
            records,
            lambda tally, name: tally.examples.get(name),
            lambda tally: sum(map(tally.mean, names)),
            cost,
        )

    def _answer(
        self,
        kind: str,
        facts: Mapping[str, Any],
        named: _Named,
        copies: Mapping[str, int],
        records: Callable[[Tally], Iterator[Record]],
        answer: Callable[[Tally, str], Any],
        num_passes: Callable[[Tally], float],
        cost: Callable[[Mapping[str, int]], RunEstimate],
    ) -> Iterator[tuple[int, Any]]:
        """Yields what is kept, then what the new records complete, and keeps these.

        Args:
          facts: what answers of this kind depend on, beside model, policy and seed.
          copies: of each request, how many sequences have scores.
          answer: to the request of this name; None as long as something is missing.
          cost: of the requests of these names, each with so many sequences without scores.
        """
        require_same_everywhere({"requests": list(copies), "answers": facts})
        if not copies:
            return
        with self.store.open(kind, facts) as kept:
            tally = Tally(self.model.num_layers, copies, _parts(kept.all, copies))
            waiting = dict(named.places)

            def finished(names: Iterable[str]) -> Iterator[tuple[int, Any]]:
                for name in names:
                    found = answer(tally, name) if name in waiting else None
                    if found is not None:
                        yield from ((index, found) for index in waiting.pop(name))

            yield from finished(list(waiting))
            names = list(copies)
            left = Counter(names[i] for i in tally.unscored(names)[0])
            if left:
                print_cost(kind, cost(left), LOWER_BATCH_SIZE, self.say)
            pace = Pace(sum(left.values()), kind, self.say)
            for record in records(tally):
                pace.measured(len(record["scores"]), record["flops"]["seconds"])
                kept.add(record)
                tally.add(record)
                touched = [entry[0] for entry in record["scores"]]
                yield from finished(dict.fromkeys([*touched, *record.get("examples", {})]))
            self.costs[kind].append(Cost(tally.flops, num_passes(tally), len(copies)))

    # -------------------------------------------------------------------------------- the records

    def _likelihood_record(
        self, batch: LikelihoodBatch, names: Sequence[str], whole: set[str]
    ) -> Record:
        """Its examples say by name whether an answer is greedy."""
        scores, of = batch.scores, [names[i] for i in batch.requests]
        layer_counts = LayerCounts(self.model.num_layers)
        layer_counts.add(scores.gates, scores.masked_share)
        greedy = {
            name: bool(best)
            for name, copy, best in zip(of, batch.copies, scores.is_greedy, strict=True)
            if copy == WHOLE or name in whole
        }
        scored = np.flatnonzero(batch.copies != WHOLE)
        return make_batch_record(
            [of[i] for i in scored],
            batch.copies[scored].tolist(),
            scores.log_likelihood[scored].tolist(),
            batch.flops,
            layer_counts,
            greedy,
        )

    def _generation_record(self, batch: GenerationBatch, names: Sequence[str]) -> Record:
        """Its examples are the generated ids; a score is the number of calls that worked on it."""
        of = [names[i] for i in batch.requests]
        # A share of 0 is left out: the call was made for other sequences of the batch.
        shares = np.where(batch.out.own, batch.out.masked_share[:, : len(of)], 0.0)
        layer_counts = LayerCounts(self.model.num_layers)
        layer_counts.add(batch.out.gates, shares)
        ids = dict(zip(of, batch.answers.tolist(), strict=True))
        return make_batch_record(
            of,
            [0] * len(of),
            batch.out.passes.astype(float).tolist(),
            batch.out.flops,
            layer_counts,
            ids,
        )

    # ------------------------------------------------------------------------------- the requests

    def _fit_pair(self, index: int, pair: Pair) -> tuple[PromptIds, PromptIds]:
        prompt, answer = map(as_tuple, pair)
        room = self.model.config.max_length - len(answer)
        return self._fit(f"pair {index}", prompt, room), answer

    def _fit(self, what: str, prompt: PromptIds, room: int) -> PromptIds:
        """The prompt, or its last `room` tokens."""
        if len(prompt) <= room:
            return prompt
        require(
            room > 0 and self.settings.too_long == "cut",
            f"{what}: {len(prompt)} tokens of the prompt, and room for {room} beside its answer in "
            f"the model's {self.model.config.max_length} positions; give fewer examples, a shorter "
            "answer, or too_long=cut",
        )
        self.num_cut += 1
        return prompt[-room:]

    def _keys(self, requests: Sequence[Any]) -> jax.Array:
        return request_keys(self.settings.seed, list(map(request_hash, requests)))

    def _batching(self) -> dict[str, int]:
        return {name: getattr(self.settings, name) for name in BATCHING}


class _Named(NamedTuple):
    """Requests by a digest of their ids; equal ones share a name."""

    requests: dict[str, Any]
    places: dict[str, list[int]]  # where each one stands in the call

    @classmethod
    def of(cls, requests: Sequence[Any]) -> _Named:
        named = cls({}, {})
        for index, request in enumerate(requests):
            name = digest_text(repr(request))[:24]
            named.requests[name] = request
            named.places.setdefault(name, []).append(index)
        return named


def _remaining_copies(
    tally: Tally, names: Sequence[str], whole: set[str]
) -> tuple[np.ndarray, np.ndarray]:
    """The copies to run, as `likelihood_batches` takes them; after a pair's own its whole one."""
    copies = []
    for name in names:
        _, unscored = tally.unscored([name])
        missing = name not in tally.examples and name not in whole
        copies.append([*unscored, WHOLE] if missing else unscored)
    pair_of = np.repeat(np.arange(len(names)), [len(own) for own in copies])
    return pair_of, np.concatenate([np.zeros(0, int), *copies])


def _parts(records: Iterable[Record], names: Mapping[str, Any]) -> Iterator[Record]:
    """What records hold of the named requests."""
    for record in records:
        scores = [entry for entry in record["scores"] if entry[0] in names]
        examples = {n: x for n, x in record.get("examples", {}).items() if n in names}
        if scores or examples:
            yield {**record, "scores": scores, "examples": examples}
