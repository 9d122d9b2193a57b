"""The settings of a sweep on its page: all that is needed to repeat it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dials_jax.reporting import html

EMPTY = ("", [], {})  # and None: settings that are not set
# Fields of a task that `run["generation"]` has, completed, or that the heading shows.
_GENERATION = ("sampler", "cache", "until")
DIGESTS = ("kind", "label", "training", "router")  # of a policy: shown otherwise
_SHARED = ("model", "routers", "tasks")  # fields of the sweep with a place of their own


def settings_html(results: Mapping[str, Any]) -> str:
    """Sections of the sweep, every task, the policies and every training."""
    config = _without(results.get("config", {}), _SHARED)
    if seeds := sorted({run["seed"] for run in results["runs"] if "seed" in run}):
        config["seed"] = seeds  # of all calls, of which the configuration is the last one's
    sections = [("Sweep", _facts(config))]
    by_task: dict[str, Mapping[str, Any]] = {}
    for run in results["runs"]:
        by_task.setdefault(run["task"], run)
    sections += [(f"Task {task}", _facts(_task_settings(run))) for task, run in by_task.items()]
    sections.append(("Policies", html.definition_list(_policies(results["runs"]))))
    sections += [
        (f"Training of {name}", _facts(settings)) for name, settings in _trainings(results).items()
    ]
    shown = [(title, body) for title, body in sections if body]
    return html.collapsible_sections(shown, num_open=len(shown))


def _policies(runs: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """What each policy does, and on which tasks if it is not the same on all."""
    tasks_of: dict[tuple[str, str], dict[str, None]] = {}
    for run in runs:
        tasks = tasks_of.setdefault((run["policy"]["label"], _describe_policy(run)), {})
        tasks[run["task"]] = None  # once, whatever the seeds
    every = {run["task"] for run in runs}
    return [
        (label, text if set(tasks) == every else f"{text} ({', '.join(tasks)})")
        for (label, text), tasks in tasks_of.items()
    ]


def _describe_policy(run: Mapping[str, Any]) -> str:
    policy = run["policy"]
    kind, layers = policy["kind"], policy.get("layers")
    if kind == "full":
        return "runs every layer"
    if kind == "random":
        return f"skips {policy['num_skipped']} random layers, drawn per sequence and step"
    if layers is not None:
        which = f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))} (from 0)"
        chosen = run.get("calibration")
        why = f"; chosen by Goel, Algorithm 1, on {chosen}" if chosen else ""
        return f"skips {which} at every step{why}"
    if "digest" in policy:
        return f"{kind}: given from Python"
    facts = {name: value for name, value in policy.items() if name not in DIGESTS}
    return ", ".join(f"{name} {_text(value)}" for name, value in _flat({**facts, **_router(run)}))


def _router(run: Mapping[str, Any]) -> dict[str, Any]:
    """Where a router comes from, and its threshold."""
    return dict(run.get("router", {}))


def _task_settings(run: Mapping[str, Any]) -> dict[str, Any]:
    settings = {"metric": run["metric"]} | _without(run.get("settings", {}), ("name", "metric"))
    if generation := run.get("generation"):
        settings = _without(settings, (*_GENERATION, "num_samples", "cfg_scale")) | generation
    return settings


def _trainings(results: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The settings of every training that is known, by what it trained."""
    found = {"the model": results["model"].get("trained")}
    for run in results["runs"]:
        if run.get("trained"):
            found[run.get("router", {}).get("path", run["policy"]["label"])] = run["trained"]
    return {name: settings for name, settings in found.items() if settings}


def _facts(settings: Mapping[str, Any]) -> str:
    return html.definition_list([(name, _text(value)) for name, value in _flat(settings)], "facts")


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings with a value, those of groups as `group.name`. An empty delimiter is a value."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif value is not None and (value not in EMPTY or name.endswith("delimiter")):
            yield f"{prefix}{name}", value


def _without(settings: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in names}


def _text(value: Any) -> str:
    """Numbers as they are, texts of lists quoted, because they may hold spaces or line breaks."""
    if isinstance(value, str):
        plain = value and value.isprintable() and value.strip() == value
        return value if plain else json.dumps(value)
    if isinstance(value, list | tuple):
        return ", ".join(json.dumps(x, ensure_ascii=False) for x in value)
    return str(value)
