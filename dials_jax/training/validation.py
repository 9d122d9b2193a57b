"""Held-out data in training: how good the result is, and how many layers routers run at inference.

The sampled votes of training say little about that: routers that skip 38 % of the layers under
Gumbel noise may skip 4 % without it. So routers are run both ways on the same texts (DIALS,
Figure 7).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Int

from dials_jax import sharding, trees
from dials_jax.compiling import compiler_options
from dials_jax.config import ModelConfig, ObjectiveConfig, RouterConfig, TrainConfig
from dials_jax.data.batches import Batch, TrainingData, batch_at
from dials_jax.keys import seed_key
from dials_jax.skipping.routed import Routed, advice_if_idle
from dials_jax.training.losses import (
    Draws,
    LossFn,
    Mean,
    Metrics,
    count_rows,
    merge_metrics,
    routed_metrics,
    router_loss,
)
from dials_jax.training.step import TrainState, split_microbatches, sum_over_microbatches

# The seed of the order and of the masks of held-out texts: the same in every training.
HELD_OUT_SEED = 0x76616C69
METRIC_PREFIX = "validation/"  # of the metrics' names

# score(trainable, frozen, batch, draws) -> metrics
Score = Callable[[trees.Params, trees.Params, Batch, Draws], Metrics]


def held_out_batch(data: TrainingData, number: int, batch_size: int, mesh: Mesh) -> Batch:
    """The batch of this number, on the devices; it is the same in every training.

    Every row is in one batch, once. What fills the last batch has no answer, so nothing of it is
    masked or counted.
    """
    where = jax.process_index(), jax.process_count()
    batch = batch_at(data, HELD_OUT_SEED, number, batch_size, *where)
    is_row = number * batch_size + batch.sequence_index < data.num_rows
    return sharding.place_batch(batch._replace(answer=batch.answer & is_row[:, None]), mesh)


def held_out_key(number: Int[Array, ""] | int) -> jax.Array:
    """The key of the draws of the batch of this number."""
    return jax.random.fold_in(seed_key(HELD_OUT_SEED), number)


@lru_cache(maxsize=16)
def model_score(loss: LossFn) -> Score:
    """Returns the metrics of a loss."""
    return lambda params, frozen, batch, draws: loss(params, frozen, batch, draws)[1]


@lru_cache(maxsize=16)
def router_score(
    cfg: ModelConfig,
    router: RouterConfig,
    objective: ObjectiveConfig,
    thresholds: tuple[float, ...] = (),
) -> Score:
    """Returns the metrics of routers under the noise of training and without it.

    `execution` and `masked_ce` are of inference, `execution_sampled` and `loss` of training.

    Args:
      thresholds: more values of tau; the metrics of each end in @ and its value.
    """
    sampled, routed = (
        router_loss(cfg, router, objective, remat=False),
        routed_metrics(cfg, objective),
    )
    taus = (router.skip_threshold, *thresholds)
    ends = ("", *(f"@{tau:g}" for tau in thresholds))

    def score(routers, backbone, batch, draws):
        _, of_training = sampled(routers, backbone, batch, draws)
        skipped = of_training["skip_rate"]

        def at(tau):
            return routed(Routed(routers, tau, router.votes), backbone, batch, draws)

        by_tau = jax.lax.map(at, jnp.array(taus))  # one after the other: memory for one
        found = {
            "loss": of_training["loss"],
            "execution_sampled": Mean(skipped.count - skipped.total, skipped.count),
        }
        for i, end in enumerate(ends):
            found |= {f"{k}{end}": Mean(m.total[i], m.count[i]) for k, m in by_tau.items()}
        return found

    return score


class Validation:
    """Scores the result of a training so far on held-out batches, always the same.

    Attributes:
      last: the metrics of the last call; {} before the first.
    """

    def __init__(self, score: Score, data: TrainingData, mesh: Mesh, cfg: TrainConfig):
        number = min(cfg.validation_batches, -(-data.num_rows // cfg.batch_size))
        self._batches = [held_out_batch(data, i, cfg.batch_size, mesh) for i in range(number)]
        self._score = _jit_score(score, cfg.num_microbatches)
        self._every = cfg.validate_every
        self.last: dict[str, float] = {}

    def is_due(self, done: int, total: int) -> bool:
        """Whether the state after `done` steps of `total` is to be scored."""
        return done % self._every == 0 or done == total

    def __call__(self, state: TrainState, frozen: trees.Params) -> dict[str, float]:
        """The metrics over all batches, which the devices compute before the host waits."""
        parts = [
            self._score(state.result, frozen, batch, jnp.int32(i), state.step)
            for i, batch in enumerate(self._batches)
        ]
        found = merge_metrics(sharding.to_host(parts))
        self.last = {f"{METRIC_PREFIX}{name}": value for name, value in found.items()}
        return self.last


@lru_cache(maxsize=16)  # as `make_train_step`
def _jit_score(score: Score, num_microbatches: int) -> Callable[..., Metrics]:
    def whole(params, frozen, batch, number, step):
        def one(microbatch):
            size = count_rows(batch)
            draws = Draws.of(held_out_key(number), microbatch.sequence_index, size, step)
            return score(params, frozen, microbatch, draws)

        return sum_over_microbatches(one, split_microbatches(batch, num_microbatches))

    return jax.jit(whole, compiler_options=compiler_options())


def summarise_validation(values: dict[str, float], router: RouterConfig) -> str:
    """The last validation in a line or two; empty without any."""
    found = {name.removeprefix(METRIC_PREFIX): value for name, value in values.items()}
    if "execution" not in found:
        return ", ".join(f"{name} {value:.4f}" for name, value in found.items())
    others = [
        f"{value:.1%} at tau={name.partition('@')[2]}"
        for name, value in found.items()
        if name.startswith("execution@")
    ]
    line = (
        f"{found['execution']:.1%} of the layers run at inference (tau={router.skip_threshold:g}, "
        f"{router.votes} votes), {found['execution_sampled']:.1%} under the votes of training; "
        f"{found['masked_ce']:.4f} nats per masked token"
    )
    advice = advice_if_idle(found["execution"])
    return "; ".join([line, *others]) + (f"\nwarning: {advice}" if advice else "")
