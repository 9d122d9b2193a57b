"""Schedules put to the test: unconditional samples, scored, a batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from dials_jax import sharding, trees
from dials_jax.config import SamplingStudy, nearest, require
from dials_jax.data.tokenizer import Tokenizer, load_tokenizer
from dials_jax.evaluation.generative import (
    Aggregate,
    Scores,
    check_scorer,
    perplexities,
    retokenise,
    score_samples,
    unigram_entropy,
)
from dials_jax.evaluation.results import Records
from dials_jax.loading import load
from dials_jax.models.model import Model
from dials_jax.sampling.ancestral import Ancestral
from dials_jax.sampling.generate import generate
from dials_jax.sampling.schedule import Schedule
from dials_jax.skipping.policies import Static

EXAMPLE_CHARACTERS = 600  # of the first sample of each schedule, to look at


class Measured(NamedTuple):
    """What the samples of one schedule are like, and what they cost."""

    scores: Scores
    entropy: Float[np.ndarray, "N"]  # nats
    seconds: float  # of sampling alone, compilation apart
    flops: float  # of sampling, all counted

    def values(self, aggregate: Aggregate) -> Float[np.ndarray, "N"]:
        return perplexities(self.scores, aggregate)


class Bench:
    """The models, the scorer and the records of one study."""

    def __init__(self, cfg: SamplingStudy, schedules: Sequence[Schedule]):
        """Loads all models.

        Raises: InputError for schedules or models that would stop the study half-way.
        """
        check_schedules(cfg, schedules)
        self.cfg = cfg
        self.sampler = Ancestral(cfg.length, cfg.steps, cfg.precision)
        mesh = sharding.make_mesh(cfg.mesh)
        self.models = {
            letter: load(path, cfg.dtype, mesh, cfg.layout) for letter, path in cfg.models
        }
        self.policies = {
            letter: Static([int(n) for n in layers.split(",")]) for letter, layers in cfg.static
        }
        for letter, policy in self.policies.items():
            policy.check(self.models[letter].num_layers)
        self.scorer = load(cfg.scorer, "float32", mesh)
        self.sampled = next(iter(self.models.values())).config
        self.tokenizers = self._tokenizers()
        self._check_scorer()

    def _tokenizers(self) -> tuple[Tokenizer, Tokenizer] | None:
        """Of the samples and of the scorer; None where neither is needed."""
        if self.cfg.retokenize == "never":
            return None
        model = next(iter(self.models.values()))
        return load_tokenizer(model.path), load_tokenizer(self.scorer.path)

    @property
    def retokenises(self) -> bool:
        """Whether samples reach the scorer as text, and not as the ids they are."""
        if self.tokenizers is None:
            return False
        ours, theirs = self.tokenizers
        return self.cfg.retokenize == "always" or ours.fingerprint != theirs.fingerprint

    def _check_scorer(self) -> None:
        cfg, scorer = self.cfg, self.scorer.config
        length = cfg.score_length if self.retokenises else min(cfg.length, cfg.score_length)
        check_scorer(scorer, length)
        require(
            self.retokenises or scorer.eos_id == self.sampled.eos_id,
            f"end of text is {self.sampled.eos_id} for the samplers and {scorer.eos_id} for the "
            "scorer; set retokenize=always",
        )

    def describe(self) -> dict[str, Any]:
        """What the results depend on beside the configuration."""

        def facts(model: Model) -> dict[str, Any]:
            return {
                "path": model.path,
                "num_layers": model.num_layers,
                "parameters": trees.count_parameters(model.params),
                "fingerprint": model.fingerprint,
            }

        models = {letter: facts(model) for letter, model in self.models.items()}
        return {"models": models, "scorer": facts(self.scorer)}

    def measure(
        self, schedule: Schedule, records: Records, progress: Callable[[int], Any] = lambda n: None
    ) -> Measured:
        """Samples and scores what the records do not hold yet, and puts it there."""
        done = [record for record in records.all if record["schedule"] == str(schedule)]
        first = sum(len(record["nll"]) for record in done)
        while first < self.cfg.num_samples:
            record = self._run_batch(schedule, first)
            records.add(record)
            done.append(record)
            first += len(record["nll"])
            progress(len(record["nll"]))
        return measured(done)

    def _run_batch(self, schedule: Schedule, first: int) -> dict[str, Any]:
        cfg = self.cfg
        numbers = jnp.arange(first, min(first + cfg.batch_size, cfg.num_samples))
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(cfg.seed), numbers)
        out = generate(
            self.models,
            None,
            sampler=self.sampler,
            schedule=schedule,
            policy=self.policies,
            key=keys,
            num_rows=len(numbers),
            fill_to=cfg.batch_size,
        )
        ids = self._scored_ids(out.tokens)
        scores = score_samples(self.scorer, ids, cfg.batch_size)
        record = {
            "schedule": str(schedule),
            "first": first,
            "nll": scores.nll.tolist(),
            "weight": scores.weight.tolist(),
            "entropy": unigram_entropy(out.tokens).tolist(),
            "nfe": out.nfe,
            "flops": out.flops.model_total,
            "seconds": out.flops.seconds,
        }
        return record | ({} if first else self._example(out.tokens[0]))

    def _scored_ids(self, samples: Int[np.ndarray, "B T"]) -> Int[np.ndarray, "B S"]:
        length = self.cfg.score_length
        if not self.retokenises:
            return samples[:, :length]
        ends = self.sampled.eos_id, self.scorer.config.eos_id
        return retokenise(samples, *self.tokenizers, *ends, length)

    def _example(self, sample: Int[np.ndarray, "T"]) -> dict[str, str]:
        if self.tokenizers is None:
            return {}
        return {"example": self.tokenizers[0].decode(sample)[:EXAMPLE_CHARACTERS]}


def check_schedules(cfg: SamplingStudy, schedules: Sequence[Schedule]) -> None:
    """Raises: InputError for schedules that name unknown models or do not fill the steps."""
    require_known(schedules, [letter for letter, _ in cfg.models])
    for schedule in schedules:
        require(
            schedule.num_steps == cfg.steps,
            f"schedule {schedule} has {schedule.num_steps} steps, but the study "
            f"steps={cfg.steps}; make them agree",
        )


def require_known(schedules: Sequence[Schedule], known: Sequence[str]) -> None:
    """Raises: InputError for a letter that names no model."""
    for schedule in schedules:
        for letter in schedule.letters:
            require(
                letter in known,
                f"schedule {schedule}: no model is called {letter!r}{nearest(letter, known)}",
            )


def measured(records: Sequence[dict[str, Any]]) -> Measured:
    """All batches of one schedule together."""

    def joined(name):
        return np.concatenate([record[name] for record in records]).astype(float)

    return Measured(
        Scores(joined("nll"), joined("weight")),
        joined("entropy"),
        sum(record["seconds"] for record in records),
        sum(record["flops"] for record in records),
    )
