"""Measures schedules: draws unconditional samples, and scores them batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from dials_jax import sharding
from dials_jax.config import SamplingStudy
from dials_jax.data.tokenizer import Tokenizer, load_tokenizer
from dials_jax.errors import require
from dials_jax.evaluation.perplexity import (
    Aggregate,
    SampleScores,
    check_scorer,
    perplexities,
    retokenise,
    score_samples,
)
from dials_jax.loading import load
from dials_jax.progress import Pace
from dials_jax.sampling.model_schedule import Schedule
from dials_jax.studies.samples import (
    Batches,
    SampledSource,
    StoredSource,
    check_batch_record,
    check_schedules,
    group_by_schedule,
    model_facts,
    static_policies,
)
from dials_jax.studies.study_records import study_records


class ScoredSamples(NamedTuple):
    """The scores of the samples of one schedule, and what sampling cost."""

    scores: SampleScores
    entropy: Float[np.ndarray, "N"]  # nats
    seconds: float  # of sampling, without compilation
    flops: float  # of sampling, the whole model counted

    def values(self, aggregate: Aggregate) -> Float[np.ndarray, "N"]:
        """One number per sample; their mean is the perplexity of the schedule."""
        return perplexities(self.scores, aggregate)


class PerplexityRun:
    """The samples, the scorer and the records of one study; `measure` scores a schedule.

    Attributes:
      pace: is told the time of every batch that is drawn; None: nothing is.
    """

    def __init__(self, cfg: SamplingStudy, schedules: Sequence[Schedule], workdir: str | Path):
        """Loads all models, or finds the samples of an earlier study.

        Raises: InputError for schedules, models or samples that would stop the study half-way, and
          for a workdir that holds another study.
        """
        check_schedules(cfg, schedules)
        self.cfg = cfg
        self.scorer = load(cfg.scorer, "float32", sharding.make_mesh(cfg.mesh))
        self.samples = StoredSource(cfg, schedules) if cfg.samples else SampledSource(cfg, workdir)
        self.first_model = next(iter(self.samples.facts.values()))
        self.tokenizers = self._load_tokenizers()
        self._check_scorer_fits()
        fingerprints = {
            letter: facts["fingerprint"] for letter, facts in self.samples.facts.items()
        }
        weights = {"models": fingerprints, "scorer": self.scorer.fingerprint}
        self.records = study_records(cfg, weights, workdir, check_batch_record)
        self._batches = group_by_schedule(self.records.all)
        self.pace: Pace | None = None

    def _load_tokenizers(self) -> tuple[Tokenizer, Tokenizer] | None:
        """The tokenizers of samples and scorer; None if the scorer takes the samples' ids."""
        if self.cfg.retokenize == "never":
            return None
        theirs, drawn_with = load_tokenizer(self.scorer.path), self.first_model["tokenizer"]
        if self.cfg.retokenize == "auto" and drawn_with in theirs.fingerprints:
            return None
        ours = load_tokenizer(self.first_model["path"])
        require(
            drawn_with in (None, *ours.fingerprints),
            f"{self.first_model['path']} has another tokenizer than when the samples were drawn; "
            "put the earlier one back",
        )
        same = self.cfg.retokenize == "auto" and ours.fingerprint == theirs.fingerprint
        return None if same else (ours, theirs)

    def _check_scorer_fits(self) -> None:
        cfg, scorer = self.cfg, self.scorer.config
        length = cfg.score_length if self.tokenizers else min(cfg.length, cfg.score_length)
        check_scorer(scorer, length)
        require(
            self.tokenizers is not None or scorer.eos_id == self.first_model["eos_id"],
            f"end of text is {self.first_model['eos_id']} for the samplers and {scorer.eos_id} for "
            "the scorer; set retokenize=always",
        )

    def describe(self) -> dict[str, Any]:
        """Describes the models, the scorer and the environment, for the results."""
        return {
            "models": self.samples.facts,
            "scorer": model_facts(self.scorer),
            "environment": self.samples.environment,
        }

    @property
    def num_done(self) -> int:
        """Samples that the records hold."""
        return sum(len(record["nll"]) for record in self.records.all)

    @property
    def depths(self) -> dict[str, int]:
        """The number of layers that each model runs, by letter."""
        skipped = {x: len(policy.layers) for x, policy in static_policies(self.cfg).items()}
        return {x: f["num_layers"] - skipped.get(x, 0) for x, f in self.samples.facts.items()}

    def measure(
        self, schedule: Schedule, on_progress: Callable[[int], Any] = lambda num_samples: None
    ) -> ScoredSamples:
        """Scores the samples of a schedule, except batches that the records hold already.

        Args:
          on_progress: called with the number of samples that were scored.
        """
        done = self._batches.setdefault(str(schedule), {})
        first = 0
        while first < self.cfg.num_samples:
            if first not in done:
                batch = self.samples.batch(schedule, first)
                scores = score_samples(
                    self.scorer, self._scorer_tokens(batch.tokens), self.cfg.batch_size
                )
                found = {"nll": scores.nll.tolist(), "weight": scores.weight.tolist()}
                done[first] = batch.record | found
                self.records.add(done[first])
                on_progress(len(batch.tokens))
                if self.pace and isinstance(self.samples, SampledSource):
                    self.pace.measured(len(batch.tokens), batch.record["seconds"])
            first += len(done[first]["nll"])
        return join_batches(done)

    def _scorer_tokens(self, samples: Int[np.ndarray, "B T"]) -> Int[np.ndarray, "B S"]:
        """The samples as tokens of the scorer."""
        length = self.cfg.score_length
        if self.tokenizers is None:
            return samples[:, :length]
        ends = self.first_model["eos_id"], self.scorer.config.eos_id
        return retokenise(samples, *self.tokenizers, *ends, length)


def join_batches(batches: Batches) -> ScoredSamples:
    """Joins the batches of one schedule, in the order of their samples."""
    records = [batches[first] for first in sorted(batches)]

    def join_values(name):
        return np.concatenate([record[name] for record in records]).astype(float)

    return ScoredSamples(
        SampleScores(join_values("nll"), join_values("weight")),
        join_values("entropy"),
        sum(record["seconds"] for record in records),
        sum(record["flops"] for record in records),
    )
