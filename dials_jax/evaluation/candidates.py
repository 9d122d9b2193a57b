"""The policies of a sweep: full, routed and random ones, each with its label and its facts."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dials_jax.digests import content_id
from dials_jax.errors import require
from dials_jax.evaluation.answer_store import policy_digest
from dials_jax.evaluation.older_sweeps import router_id
from dials_jax.evaluation.own_code import code_facts
from dials_jax.evaluation.sweep_groups import POLICY_KINDS
from dials_jax.evaluation.sweep_identity import router_training
from dials_jax.evaluation.task import EvalConfig
from dials_jax.models.model import Model
from dials_jax.nn.policy import Policy, check_policy, policy_name
from dials_jax.reporting.environment import training_settings
from dials_jax.skipping.policies import Random
from dials_jax.skipping.routed import Routed
from dials_jax.skipping.storage import RouterInfo, load_router, router_facts


@dataclass(frozen=True)
class Candidate:
    """A policy of the sweep, its label in the report, and facts about it such as its lambda.

    Attributes:
      notes: stored with its runs, but not part of what it is: how its router was trained, or what
        its layers were chosen by.
    """

    label: str
    policy: Policy | None
    facts: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return policy_name(self.policy)

    def describe(self) -> dict[str, Any]:
        """The policy as records store it."""
        return {"kind": self.kind, "label": self.label, **self.facts}


def routed_candidates(cfg: EvalConfig, model: Model) -> tuple[list[Candidate], dict[str, Any]]:
    """Loads every router, and makes its policies; by rising lambda.

    Also describes them, by `router_id`. Routers of one lambda and one training but for its seed
    have one label, and make one row.
    """
    found, routers, paths = [], {}, {}
    for path in cfg.routers:
        folder, info = router_facts(path)
        training = {"training": router_training(folder, info), "folder": Path(path).name}
        router = load_router(path, model)
        for candidate, threshold in _router_candidates(cfg, info, router, path):
            known = {"digests": info.digests, "threshold": threshold}
            if candidate.policy.votes != "hard":
                known["votes"] = candidate.policy.votes
            number = router_id(known)
            require(
                number not in routers,
                f"routers: {path} and {paths.get(number)} hold one router, weight for weight; "
                "remove one of them",
            )
            paths[number] = path
            candidate.facts.update(training, router=number)
            notes = _router_notes(candidate.policy, path)
            found.append(dataclasses.replace(candidate, notes=notes))
            routers[number] = known | {"label": candidate.label} | candidate.facts
    return sorted(found, key=lambda c: c.facts["lambda"]), routers


def _router_notes(policy: Routed, path: str) -> dict[str, Any]:
    """Where a router is, how it votes and how it was trained, for the report."""
    router = {
        "path": path,
        "threshold": np.asarray(policy.threshold).tolist(),
        "votes": policy.votes,
    }
    return {"router": router, "trained": training_settings(path)}


def _router_candidates(
    cfg: EvalConfig, info: RouterInfo, router: Routed, path: str
) -> Iterator[tuple[Candidate, Any]]:
    """The policies of one router, each with the threshold that is not the router's own."""
    label, facts = f"routed λ={info.skip_weight:g}", {"lambda": info.skip_weight}
    soft = {} if cfg.votes in (None, info.router.votes) else {"votes": cfg.votes}
    end = f" {cfg.votes}" if soft else ""
    router = dataclasses.replace(router, **soft)
    taus = cfg.skip_threshold
    for tau in taus if isinstance(taus, tuple) else (taus,):
        if tau is None:
            yield Candidate(f"{label}{end}", router, {**facts, **soft}), None
        else:
            policy = dataclasses.replace(router, threshold=tau)
            where = {**facts, "threshold": tau, **soft}
            yield Candidate(f"{label} τ={tau:g}{end}", policy, where), tau
    for ratio in cfg.execution_ratios:
        fit = info.fitted_to(ratio, path)
        policy = dataclasses.replace(router, threshold=fit.threshold, votes=fit.votes)
        where = {**facts, "execution_ratio": ratio}
        yield Candidate(f"{label} fitted to {ratio:g}", policy, where), list(fit.thresholds)


def own_candidates(policies: Mapping[str, Policy], labels: Collection[str]) -> list[Candidate]:
    """Policies that a caller made, by their labels.

    Args:
      labels: of the sweep's other policies.

    Raises: InputError for what is no policy, and for a label that is taken.
    """
    found: list[Candidate] = []
    label_of: dict[str, str] = {}
    for label, policy in policies.items():
        require(label not in labels, f"policies: {label!r} is a policy of the sweep; rename yours")
        require(policy is not None, f"policies: {label!r} is None; the full model is there already")
        check_policy(policy)
        kind = policy_name(policy)
        digest = content_id([policy_digest(policy), code_facts(policy=policy)])
        require(
            digest not in label_of,
            f"policies: {label!r} and {label_of.get(digest)!r} are one policy; remove one",
        )
        label_of[digest] = label
        known = "own" if kind in POLICY_KINDS else kind
        found.append(Candidate(label, policy, {"kind": known, "digest": digest}))
    return found


def random_candidates(cfg: EvalConfig) -> list[Candidate]:
    return [Candidate(f"random k={k}", Random(k), {"num_skipped": k}) for k in cfg.num_random]
