"""How fast a model generates under several policies and caches, timed in turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from dials_jax.caching.cache import Cache
from dials_jax.caching.parse import cache_name
from dials_jax.config import ModelConfig
from dials_jax.errors import require
from dials_jax.evaluation.batched import generation_batches
from dials_jax.evaluation.timing import Timings, time_in_turns
from dials_jax.models.model import Model
from dials_jax.nn.policy import Policy, check_policy
from dials_jax.progress import format_bytes, progress_bar
from dials_jax.reporting.environment import environment
from dials_jax.reporting.publish import Table
from dials_jax.sampling.generation import Generation
from dials_jax.sampling.sampler import Sampler
from dials_jax.skipping.flops import Flops
from dials_jax.text import draw_keys


class Case(NamedTuple):
    """A policy and a cache, and the policy's name in the table."""

    label: str
    policy: Policy | None
    cache: Cache | None


@dataclass(frozen=True, repr=False)
class Bench:
    """What is generated, and under what.

    Attributes:
      prompts: token ids, of any lengths.
    """

    model: Model
    prompts: Sequence[Sequence[int]]
    sampler: Sampler
    cases: Sequence[Case]
    batch_size: int = 8
    seed: int = 0

    def __repr__(self) -> str:
        return f"Bench({self.model!r}, {len(self.prompts)} prompts, {len(self.cases)} cases)"

    def measure(self, repeats: int) -> list[dict[str, Any]]:
        """A row per case: its median time of `repeats`, its spread, and what it computes.

        Raises: InputError for a case that does not compose, before anything runs.
        """
        present = np.ones((1, max(map(len, self.prompts))), bool)
        for case in self.cases:
            check_policy(case.policy)
            self.sampler.check(self.model.config, present, case.policy, case.cache)
        total = len(self.cases) * (repeats + 1)
        with progress_bar(total, 0, "generations", "run") as bar:
            found = time_in_turns([*map(self._runner, self.cases)], repeats, bar.update)
        return [self._row(case, own) for case, own in zip(self.cases, found, strict=True)]

    def _runner(self, case: Case) -> Any:
        return lambda: self._run(case)

    def _run(self, case: Case) -> list[Generation]:
        """Generates once for all prompts."""
        batches = generation_batches(
            self.model,
            self.prompts,
            sampler=self.sampler,
            policy=case.policy,
            cache=case.cache,
            keys=draw_keys(self.seed, self.prompts),
            batch_size=min(self.batch_size, len(self.prompts)),
        )
        return [batch.out for batch in batches]

    def _row(self, case: Case, found: Timings) -> dict[str, Any]:
        flops = Flops.sum([out.flops for out in found.outs])
        tokens = sum(int(out.num_tokens.sum()) for out in found.outs)
        passes = sum(int(out.passes.sum()) for out in found.outs)
        return {
            "policy": case.label,
            "cache": cache_name(case.cache),
            "seconds": found.median,
            "spread": found.spread,
            "tokens_per_second": tokens / found.median,
            "tokens_per_pass": tokens / passes,
            "passes": passes / len(self.prompts),
            "layers_run": flops.layers_run,
            "flops_share": flops.flops_share,
            "program_gb": found.program_bytes / 1e9,
            "compile_seconds": found.compile_seconds,
            "all_seconds": found.seconds,
        }

    @property
    def environment(self) -> dict[str, Any]:
        """Where it runs, and what is generated."""
        lengths = [len(prompt) for prompt in self.prompts]
        return environment(self.model, self.seed) | {
            "model": self.model.path,
            "sampler": str(self.sampler),
            "prompts": len(lengths),
            "prompt_tokens": [min(lengths), max(lengths)],
            "batch_size": self.batch_size,
        }

    def table(self, rows: Sequence[Mapping[str, Any]]) -> Table:
        """The rows for a terminal."""
        header = (
            "policy", "cache", "seconds", "speed-up", "tokens/s", "tokens/pass", "passes", "layers",
            "FLOPs", "memory", "compiled in",
        )  # fmt: skip
        base = rows[0]["seconds"]
        lines = [
            (
                row["policy"],
                row["cache"],
                f"{row['seconds']:.3g} ±{row['spread']:.1g}",
                f"{base / row['seconds']:.2f}x",
                f"{row['tokens_per_second']:.1f}",
                f"{row['tokens_per_pass']:.2f}",
                f"{row['passes']:.1f}",
                f"{row['layers_run']:.1%}",
                f"{row['flops_share']:.1%}",
                format_bytes(1e9 * row["program_gb"]),
                f"{row['compile_seconds']:.1f} s",
            )
            for row in rows
        ]
        return Table(header, lines)


def prompt_length_of(cfg: ModelConfig) -> int:
    """Tokens of a prompt where none is given: 64, or half of the model's positions."""
    return min(64, cfg.max_length // 2)


def random_prompts(
    cfg: ModelConfig, count: int | None, length: int | None, seed: int
) -> list[list[int]]:
    """Prompts of random tokens, special ones left out.

    Args:
      count: None: 8.
      length: None: 64 tokens, or half of the model's positions.
    """
    length = prompt_length_of(cfg) if length is None else length
    count = 8 if count is None else count
    require(count > 0 and length > 0, f"{count} prompts of {length} tokens: give positive numbers")
    special = [cfg.mask_id, cfg.pad_id, cfg.eos_id, cfg.eot_id]
    plain = np.setdiff1d(np.arange(cfg.vocab_size), [x for x in special if x is not None])
    drawn: Int[np.ndarray, "n P"] = np.random.default_rng(seed).choice(plain, (count, length))
    return drawn.tolist()
