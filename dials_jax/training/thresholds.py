"""Thresholds of routers, fitted on held-out text so that a given share of the layers runs.

What a layer's tokens vote depends on the layers that ran before it. So one pass fits all layers in
order: at each the threshold is set between the shares of votes of two sequences, and the sequences
above it skip the layer.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from dials_jax import sharding, trees
from dials_jax.compiling import Timed
from dials_jax.config import Data, ModelConfig, ObjectiveConfig, Votes, shown, typed
from dials_jax.data.batches import Batch, TrainingData
from dials_jax.data.sources import load_training_data
from dials_jax.errors import require
from dials_jax.models.model import Model
from dials_jax.nn.policy import Denoising, Policy
from dials_jax.skipping.policies import static_field
from dials_jax.skipping.routed import (
    Routed,
    StochasticRouted,
    check_router,
    skip_share,
    votes_to_skip,
)
from dials_jax.skipping.storage import FittedThresholds, load_router, save_fitted
from dials_jax.training.losses import Draws, check_objective, run_masked
from dials_jax.training.validation import held_out_batch, held_out_key

log = logging.getLogger(__name__)

NUM_HALVINGS = 14  # of the range of one threshold for all layers: to 6e-5
NUM_PASSES = 4
FAR = 0.01  # from the share that was asked for: worth a warning


@typed
def fit_thresholds(
    router: str | Path,
    model: Model,
    data: Data,
    execution_ratio: float,
    *,
    votes: Votes | None = None,
    per_layer: bool = True,
    num_sequences: int = 256,
    objective: ObjectiveConfig = ObjectiveConfig(),
) -> FittedThresholds:
    """Fits thresholds and writes them into the router's folder; `load_router` then takes them.

    Every layer is skipped as often, relative to the others, as under votes with Gumbel noise.

    Args:
      router: its folder, or the workdir of its training.
      data: held-out, with prompts and answers as at inference.
      execution_ratio: the share of layers to run, in the mean over sequences and mask ratios.
      votes: what the thresholds meet; None: as trained. Hard votes are few numbers, and reach few
        ratios; soft ones reach all.
      per_layer: False fits one threshold for all layers.
      objective: how texts are masked, as in the training of the router.

    Raises: InputError for a router of another model, data or an objective that does not fit, and a
      ratio that is no share.
    """
    require(
        0 < execution_ratio < 1,
        f"execution_ratio={execution_ratio} must lie between 0 and 1: the share of layers to run",
    )
    check_objective(model.config, objective, routers=True)
    policy = load_router(router, model, votes=votes)
    rows, _ = load_training_data(data, model.config, model.path, held_out=True)
    batch = calibration_batch(rows, num_sequences, model.mesh)
    fitted = Calibration(model, objective, batch).fit(policy, execution_ratio, per_layer)
    save_fitted(router, fitted)
    return fitted


def calibration_batch(data: TrainingData, num_sequences: int, mesh: jax.sharding.Mesh) -> Batch:
    """This many sequences, or all that there are, rounded up to what the mesh divides.

    What fills the batch has no answer, so it has no vote.
    """
    require(num_sequences > 0, f"num_sequences={shown(num_sequences)} must be positive")
    size = min(num_sequences, data.num_rows)
    return held_out_batch(data, 0, size + -size % sharding.num_batch_shards(mesh), mesh)


class Calibration:
    """Held-out texts, masked once, on which thresholds are fitted."""

    def __init__(self, model: Model, objective: ObjectiveConfig, batch: Batch):
        self.num_sequences = int(sharding.to_host(batch.answer).any(axis=1).sum())
        self._model, self._batch = model, batch
        self._draws = Draws.of(held_out_key(0), batch.sequence_index, self.num_sequences)
        self._program = _timed_run(model.config, objective)

    def _run(self, policy: Policy) -> tuple[Float[np.ndarray, "L"], Any]:
        with self._model.context():
            out, _ = self._program(self._model.params, self._batch, self._draws, policy)
        return sharding.to_host(out)

    def layer_skip_rates(self, policy: Policy) -> Float[np.ndarray, "L"]:
        """How often each layer is skipped by sequences that have a masked token."""
        return self._run(policy)[0].astype(float)

    def execution(self, policy: Policy) -> float:
        """The share of layers run."""
        return 1.0 - float(self.layer_skip_rates(policy).mean())

    def fit(self, policy: Routed, execution_ratio: float, per_layer: bool) -> FittedThresholds:
        """Thresholds with which `policy` runs a share of the layers, as near as its votes allow."""
        find = self._fit_layers if per_layer else self._fit_one
        thresholds = find(policy, execution_ratio)
        fitted = replace(policy, threshold=thresholds)
        reached = self.execution(fitted)
        if abs(reached - execution_ratio) > FAR:
            soft = "fit soft votes, or " if policy.votes == "hard" else ""
            log.warning(
                "execution_ratio=%g is out of reach of %s votes: %.3f was reached; %strain with a "
                "larger lambda",
                execution_ratio, policy.votes, reached, soft,
            )  # fmt: skip
        return FittedThresholds(
            execution_ratio=execution_ratio,
            votes=policy.votes,
            thresholds=tuple(np.atleast_1d(fitted.threshold).tolist()),
            reached=reached,
            num_sequences=self.num_sequences,
        )

    def _fit_layers(self, policy: Routed, execution_ratio: float) -> Float[np.ndarray, "L"]:
        is_unrolled = trees.is_unrolled(policy.router)
        routers = trees.stack(policy.router) if is_unrolled else policy.router
        of_training = StochasticRouted(routers, float(policy.threshold), 1.0)
        sampled = self.layer_skip_rates(of_training)
        # Where all sequences vote alike, as on the embedding of [MASK] before the first layer, all
        # skip or none does. The other layers make up for that.
        given = np.full(len(sampled), np.nan)
        for _ in range(NUM_PASSES):
            rates = scale_rates(sampled, 1.0 - execution_ratio, given)
            fit = LayerFit(routers, jnp.asarray(rates, jnp.float32), policy.votes)
            found, thresholds = self._run(fit)
            stuck = np.abs(found - rates) > 1.5 / self.num_sequences
            if not (stuck & np.isnan(given)).any():
                break
            given[stuck] = found[stuck]
        return thresholds

    def _fit_one(self, policy: Routed, execution_ratio: float) -> float:
        """By halving: the higher the threshold, the more layers run."""
        low, high = 0.0, 1.0
        misses = {}
        tau = 0.0
        for _ in range(NUM_HALVINGS + 1):
            execution = self.execution(replace(policy, threshold=tau))
            misses[tau] = abs(execution - execution_ratio)
            if execution < execution_ratio:
                low = tau
            elif tau > 0:
                high = tau
            else:
                break  # not even one vote in favour skips that many
            tau = (low + high) / 2
        return min(misses, key=misses.get)


def scale_rates(
    rates: Float[np.ndarray, "L"], mean: float, given: Float[np.ndarray, "L"]
) -> Float[np.ndarray, "L"]:
    """Rates times one factor, at most 1 each, so that their mean is `mean`.

    If too many are 0 the others become 1, and the mean is less.

    Args:
      given: rates that are settled; NaN where they are not.
    """
    scaled = np.nan_to_num(given)
    free = np.isnan(given) & (rates > 0)
    while free.any():
        left = max(mean * len(rates) - scaled[~free].sum(), 0.0)
        scaled[free] = rates[free] * left / rates[free].sum()
        full = free & (scaled >= 1)
        if not full.any():
            break
        scaled[full] = 1.0
        free &= ~full
    return scaled


class LayerToFit(NamedTuple):
    router: trees.Params
    skip_rate: Float[Array, "..."]
    layer: Int[Array, "..."]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerFit:
    """A policy that skips each layer for a given share of the batch, by the order of their votes.

    Its state has the thresholds that do so: [L], once per sequence.
    """

    router: PyTree
    skip_rates: Any  # float [L]; JAX also builds the class around tracers and shapes
    votes: Votes = static_field(default="hard")

    def init_state(self, h: Float[Array, "B T D"], denoising: Denoising) -> Float[Array, "B L"]:
        return jnp.zeros((h.shape[0], self.skip_rates.shape[0]))

    def prepare(self, num_layers: int, denoising: Denoising) -> LayerToFit:
        check_router(self.router, num_layers)
        return LayerToFit(self.router, self.skip_rates, np.arange(num_layers))

    def gate(
        self, prepared: LayerToFit, h: Float[Array, "B T D"], denoising: Denoising, state: Array
    ) -> tuple[Bool[Array, "B"], Float[Array, "B L"]]:
        share = skip_share(votes_to_skip(prepared.router, h, self.votes), denoising.masked)
        tau = threshold_between(share, jnp.any(denoising.masked, axis=1), prepared.skip_rate)
        return share <= tau, state.at[:, prepared.layer].set(tau)


def threshold_between(
    share: Float[Array, "B"], voting: Bool[Array, "B"], skip_rate: Float[Array, ""]
) -> Float[Array, ""]:
    """The threshold that `skip_rate` of the voting sequences exceed; the nearest that there is.

    It lies in the middle between two shares, or is 1 to skip none. Equal shares stay together, and
    0 exceeds nothing.
    """
    order = jnp.sort(jnp.where(voting, share, 0.0), descending=True)
    above = jnp.concatenate([jnp.ones(1), order])  # what the last sequence that skips has
    below = jnp.concatenate([order, jnp.zeros(1)])  # what the first that does not has
    tau = (above + below) / 2
    tau = jnp.where(tau < above, tau, below)  # the middle of neighbouring numbers is one of them
    counts = jnp.arange(len(above))
    miss = jnp.abs(counts - skip_rate * jnp.sum(voting))
    best = jnp.argmin(jnp.where((above > below) | (counts == 0), miss, jnp.inf))
    return jnp.where(best == 0, 1.0, tau[best])


@lru_cache(maxsize=16)
def _timed_run(cfg: ModelConfig, objective: ObjectiveConfig) -> Timed:
    def run(params, batch, draws, policy):
        """How often each layer is skipped, and the policy's state after one sequence."""
        out, num_masked = run_masked(cfg, objective, params, batch, draws, policy)
        voting = num_masked > 0
        rates = jnp.sum((1.0 - out.gates) * voting, axis=1) / jnp.maximum(jnp.sum(voting), 1)
        return rates, jax.tree.map(lambda x: x[0], out.policy_state)

    return Timed(run)
