"""What 8 bits change, against the same model without: `python -m benchmarks.eight_bits --help`.

    python -m benchmarks.eight_bits --config configs/demo/sweep.py --workdir runs/eight_bits \\
        --caches es-8-2 --light runs/demo/light

Everything is paired, by item and with the same masks. Of the configuration's tasks, and of those
that generate with every cache of --caches once more:

  scores   exact match and the other scores, and the NELBO of the tasks' answers
  answers  of greedy texts the share of tokens that are the same, and their NELBO under the whole
           model without 8 bits; the exact match, that of a schedule with --light, too; the share
           of routers' decisions that are others on the same inputs

Intervals are of 95 %, over items. Layers that static policies leave out are those named in
`static_layers`: choices by similarity may differ between the models.

What is done is kept in the workdir: the same command goes on where it was stopped. Options that are
not known are fields of the configuration, as --batch-size 50. What outlier channels there are, and
what rounding costs each product: `python -m benchmarks.eight_bits_ranges`.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.command import add_out, make_main
from benchmarks.eight_bits_answers import answer_rows, paired_row
from benchmarks.report import LiveTable
from dials_jax.caching.parse import parse_cache
from dials_jax.commands import override
from dials_jax.config_files import load_config
from dials_jax.errors import require
from dials_jax.evaluation.sweep import sweep
from dials_jax.evaluation.task import EvalConfig, EvalTask
from dials_jax.reporting.results import SweepResults

KINDS = ("fp8", "int8")
PARTS = ("scores", "answers")
COLUMNS = {
    "weights": "<7", "task": "<20", "policy": "<22", "measure": "<14", "plain": ">8.4f",
    "in_8_bits": ">9.4f", "difference": ">10.5f", "low": ">9.5f", "high": ">9.5f", "p": ">7.3f",
    "items": ">6d",
}  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="of a sweep: model, routers and tasks")
    parser.add_argument("--workdir", required=True, help="keeps the sweeps, one folder for each")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument(
        "--caches", nargs="+", default=[], help="also generate with: prefix, dual, es-PROMPT-BLOCK"
    )
    parser.add_argument("--light", help="a model that takes the first and last steps of a schedule")
    parser.add_argument("--light-share", type=float, default=0.5, help="of the schedule's steps")
    parser.add_argument(
        "--compared", type=int, default=200, help="first items whose texts and gates are compared"
    )
    parser.add_argument("--samples", type=int, default=32, help="masks per answer of the NELBO")
    add_out(parser)


def run(options: argparse.Namespace) -> None:
    cfg = override(load_config(options.config, EvalConfig), options.fields)
    cfg = with_caches(with_nelbo(cfg, options.samples), options.caches)
    require(cfg.weights is None, "weights is what the benchmark changes; leave it out")
    table = LiveTable(COLUMNS, options.out, vars(options))
    folder = Path(options.workdir)
    plain = sweep(cfg, folder / "plain") if "scores" in options.parts else None
    for kind in options.kinds:
        if plain is not None:
            quantised = sweep(dataclasses.replace(cfg, weights=kind), folder / kind)
            for row in score_rows(plain, quantised):
                table.add_row(weights=kind, **row)
        if "answers" in options.parts:
            schedule = options.light, options.light_share
            for row in answer_rows(cfg, kind, options.compared, options.samples, *schedule):
                table.add_row(weights=kind, **row)


def with_nelbo(cfg: EvalConfig, num_samples: int) -> EvalConfig:
    """Adds the NELBO of the answers that a task generates."""
    tasks = list(cfg.tasks)
    for task in cfg.tasks:
        if task.metric == "exact_match":
            shared = {"data": task.data, "limit": task.limit, "num_samples": num_samples}
            tasks.append(EvalTask(name=f"{task.name}, NELBO", metric="nelbo", **shared))
    return dataclasses.replace(cfg, tasks=tuple(tasks))


def with_caches(cfg: EvalConfig, names: list[str]) -> EvalConfig:
    """Adds the tasks that generate once more for every cache."""
    caches = {name: parse_cache(name) for name in names}
    again = [
        dataclasses.replace(task, name=f"{task.name}, {name}", cache=cache)
        for name, cache in caches.items()
        for task in cfg.tasks
        if task.generates
    ]
    return dataclasses.replace(cfg, tasks=(*cfg.tasks, *again))


def score_rows(plain: SweepResults, quantised: SweepResults) -> Iterator[dict[str, Any]]:
    """Every task and policy: the scores of both models, and their paired difference."""
    ours = {(one["task"], one["policy"]["label"]): one for one in quantised["runs"]}
    for base in plain["runs"]:
        one = ours.get((base["task"], base["policy"]["label"]))
        if one is not None and _layers(one) == _layers(base):
            yield paired_row(
                base["task"], base["policy"]["label"], base["metric"], base["items"], one["items"]
            )


def _layers(one: dict[str, Any]) -> Any:
    return one["policy"].get("layers")


main = make_main("eight_bits", __doc__, add_options, run, takes_fields=True)

if __name__ == "__main__":
    sys.exit(main())
