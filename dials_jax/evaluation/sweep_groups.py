"""Which runs of a sweep stand together in its results: those of one task on the same items.

A workdir may hold runs of a task on fewer or other items, from calls with another limit or before
the data changed, and policies that differ although they have one label.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dials_jax.reporting.speed import SweepRun

Key = tuple[str, str, str | None]  # task, digest of the items, digest of the rules
POLICY_KINDS = ("full", "static", "routed", "random")  # in the order of the report; others follow


def shown_groups(runs: Sequence[SweepRun], current: Sequence[Key]) -> dict[str, list[SweepRun]]:
    """Groups runs, the newest last, by task, items and rules; gives each group a title.

    A group of earlier calls is left out once every policy in it has been scored on more items, or
    on these by later rules.

    Args:
      current: the groups of this call, in the order of the report. They come first, and are never
        left out.
    """
    groups: dict[Key, list[SweepRun]] = {key: [] for key in current}
    for run in runs:
        groups.setdefault(_key_of(run), []).append(run)
    old = [key for key in groups if key not in current]
    old = [key for key in old if not _is_exceeded(groups[key], runs)]
    old.sort(key=lambda key: (key[0], -len(groups[key][0]["items"])))
    titled: dict[str, list[SweepRun]] = {}
    for key in (*current, *old):
        if groups[key]:
            members = sorted(groups[key], key=_report_order)
            titled[_title(titled, members[0])] = _with_labels(members)
    return titled


def _key_of(run: SweepRun) -> Key:
    return run["task"], run["items_digest"], run.get("rules")


def _title(taken: Mapping[str, Sequence[SweepRun]], run: SweepRun) -> str:
    """The task's name; if it is taken, also the number of items, or that rules are earlier ones."""
    name, items = run["task"], (run["task"], run["items_digest"])
    again = any((x[0]["task"], x[0]["items_digest"]) == items for x in taken.values())
    titles = [name, f"{name}, earlier rules" if again else f"{name}, {len(run['items'])} items"]
    titles += [f"{titles[1]} ({number})" for number in range(2, len(taken) + 3)]
    return next(title for title in titles if title not in taken)


def _is_exceeded(group: Sequence[SweepRun], runs: Sequence[SweepRun]) -> bool:
    """Whether every policy of a group has a run on more items, or on its items by later rules."""
    items = group[0]["items"].keys()
    last = max(number for number, run in enumerate(runs) if run in group)
    scored = [
        (run["policy"], run["seed"])
        for number, run in enumerate(runs)
        if run["task"] == group[0]["task"]
        and run not in group
        and (run["items"].keys() > items or (run["items"].keys() == items and number > last))
    ]
    return all((run["policy"], run["seed"]) in scored for run in group)


def _report_order(run: SweepRun) -> tuple[Any, ...]:
    policy = run["policy"]
    strength = policy.get("lambda", policy.get("num_skipped", 0))
    tau = policy.get("threshold", math.inf), -policy.get("execution_ratio", 0)
    kinds = [*POLICY_KINDS, policy["kind"]]
    return kinds.index(policy["kind"]), strength, *tau, policy["label"], run["seed"]


def _with_labels(runs: Sequence[SweepRun]) -> list[SweepRun]:
    """Adds to a label what it does not say, where it stands for several policies."""
    meanings: dict[str, list[Any]] = {}
    for run in runs:
        details = meanings.setdefault(run["policy"]["label"], [])
        if _detail(run) not in details:
            details.append(_detail(run))
    return [_relabelled(run, meanings[run["policy"]["label"]]) for run in runs]


def _detail(run: SweepRun) -> tuple[Any, ...]:
    """What tells policies of one label apart: layers, training and tau of a router, or the digest
    of a policy of the caller's."""
    policy = run["policy"]
    layers = tuple(policy.get("layers", ()))
    return layers, policy.get("training"), policy.get("threshold"), policy.get("digest")


def _relabelled(run: SweepRun, details: Sequence[Any]) -> SweepRun:
    if len(details) == 1:
        return run
    policy, parts = run["policy"], []
    layers, trainings, taus, digests = ({detail[i] for detail in details} for i in range(4))
    if len(layers) > 1:
        parts.append(f"layers {', '.join(map(str, policy.get('layers', ())))}")
    if len(trainings) > 1:
        parts.append(policy.get("folder") or f"training {details.index(_detail(run)) + 1}")
    if len(taus) > 1:
        tau = policy.get("threshold")
        parts.append("its own τ" if tau is None else f"τ={tau:g}")
    if len(digests) > 1 and "digest" in policy:
        parts.append(f"version {policy['digest'][:4]}")
    end = f" ({', '.join(parts)})" if parts else ""
    return {**run, "policy": {**policy, "label": f"{policy['label']}{end}"}}
