"""The page of `benchmarks.routers`: `python -m benchmarks.routers_page RESULTS.json PAGE.md`.

Rules are compared item by item: the scores of a rule are averaged over the seeds of its routers,
and two rules meet on the same texts. At equal cost means: both have thresholds fitted to one share
of the layers and come within `NEAR` of it on the test texts; `mean_at_zero` takes out the
difference that is left.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.command import make_main
from benchmarks.routers import FITTED
from dials_jax.errors import require
from dials_jax.files import read_json
from dials_jax.statistics import adjust_by_holm, mean_at_zero, paired_test

Row = dict[str, Any]
BASELINES = ("hard, one tau", "soft, one tau")  # the paper's rule at another tau, and without noise
NEAR = 0.02  # of the layers: rules further from the ratio that they were fitted to are left out
HEAD = """# Rules for routers, at equal cost

**Question.** Routers are trained with Gumbel noise and run without it, and skip far less then.
Which rule closes the gap, and which gives the better text model at equal cost?

**Answer.** {answer}

Hardware: {device}, {date}, jax {jax}. LLaDA of {layers} layers of width {width}, trained for
{model_steps} steps of {tokens} tokens; routers for {router_steps} steps, seeds {seeds}. One model:
the seeds are of the routers alone. Scores are NELBO in nats per token of the last three quarters of
{items} held-out texts of {length} tokens, {samples} masked copies each; thresholds were fitted on
{calibration} other texts. All layers cost the same, and routers under every rule: between rules,
equal layers are equal FLOPs. Static layers need no routers, so their FLOPs are fewer.

```
{command}
python -m benchmarks.routers_page routers.json docs/results/routers.md
```
"""


class Rows:
    """The rows of results, by what they are of."""

    def __init__(self, results: Row):
        self.settings, self.training = results["settings"], results["training"]
        self._rows = results["rows"]

    def of(self, **facts: Any) -> list[Row]:
        return [row for row in self._rows if all(row.get(k) == x for k, x in facts.items())]

    def full(self) -> Row:
        return self.of(rule="full")[0]

    def fitted(self, rule: str, weight: float, ratio: float) -> list[Row]:
        """One per seed; empty unless all are there and come near the ratio."""
        rows = self.of(rule=rule, ratio=ratio, **{"lambda": weight})
        complete = len(rows) == len(self.settings["seeds"])
        near = all(abs(row["layers_run"] - ratio) <= NEAR for row in rows)
        return rows if complete and near else []


def over_seeds(rows: Sequence[Row], name: str) -> np.ndarray:
    """Values per item, in the mean over seeds."""
    return np.mean([row[name] for row in rows], axis=0)


def spread(values: Sequence[float], form: str) -> str:
    """The mean, and the standard deviation over seeds."""
    if len(values) == 1:
        return format(values[0], form)
    return f"{format(np.mean(values), form)} ± {format(np.std(values, ddof=1), form.lstrip('+'))}"


def table(head: Sequence[str], lines: Iterator[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


# ------------------------------------------------------------------------------------- tables


def gap_table(rows: Rows) -> str:
    """The share of layers run in training and at inference, tau = 0.1."""
    full = rows.full()["nelbo"]

    def lines():
        for weight, rule in itertools.product(
            rows.settings["lambdas"], ("paper", "soft", "annealed")
        ):
            found = rows.of(rule=rule, **{"lambda": weight})
            trained = "annealed" if rule == "annealed" else "paper"
            logs = [
                rows.training[f"router-{trained}-{weight:g}-{seed}"][-1]
                for seed in rows.settings["seeds"]
            ]
            yield (
                f"{weight:g}",
                rule,
                spread([log["validation/execution_sampled"] for log in logs], ".3f"),
                spread([row["layers_run"] for row in found], ".3f"),
                spread([row["nelbo"] - full for row in found], "+.4f"),
            )

    head = ("λ", "rule", "layers run, votes of training", "layers run, inference", "nats vs full")
    return table(head, lines())


def base_table(rows: Rows) -> str:
    full = rows.full()

    def lines():
        for row in [*rows.of(rule="full"), *rows.of(rule="static"), *rows.of(rule="random")]:
            layers = f" {row['layers']}" if "layers" in row else ""
            name = row["rule"] + (f" k={row['k']}{layers}" if "k" in row else "")
            paired = compare([row], [full])
            difference = "" if row is full else f"{paired.difference:+.4f} ± {paired.stderr:.4f}"
            yield name, f"{row['layers_run']:.3f}", f"{row['nelbo']:.4f}", difference

    return table(("policy", "layers run", "nats per token", "vs full"), lines())


def fitted_table(rows: Rows) -> str:
    """Nats above the full model, by rule, lambda and share of layers."""
    full = rows.full()["nelbo"]
    ratios = rows.settings["ratios"]

    def cell(rule, weight, ratio):
        found = rows.fitted(rule, weight, ratio)
        if not found:
            rest = rows.of(rule=rule, ratio=ratio, **{"lambda": weight})
            reached = [row["layers_run"] for row in rest]
            return f"out of reach ({np.mean(reached):.3f})" if reached else ""
        nats = spread([row["nelbo"] - full for row in found], "+.4f")
        return f"{nats} ({np.mean([row['layers_run'] for row in found]):.3f})"

    def lines():
        for rule, weight in itertools.product(FITTED, rows.settings["lambdas"]):
            yield rule, f"{weight:g}", *(cell(rule, weight, ratio) for ratio in ratios)

    return table(("rule", "λ", *(f"{ratio:g} of the layers" for ratio in ratios)), lines())


def compare(rows: Sequence[Row], others: Sequence[Row]) -> Any:
    one, two = (
        {str(i): nats for i, nats in enumerate(over_seeds(each, "items").tolist())}
        for each in (rows, others)
    )
    return paired_test(one, two)


def comparisons(rows: Rows, baseline: str) -> list[Row]:
    """Every rule with the baseline, at every lambda and ratio that both reach."""
    found = []
    for rule, weight, ratio in itertools.product(
        FITTED, rows.settings["lambdas"], rows.settings["ratios"]
    ):
        ours, theirs = (rows.fitted(name, weight, ratio) for name in (rule, baseline))
        if rule == baseline or not ours or not theirs:
            continue
        items, layers = (
            over_seeds(ours, name) - over_seeds(theirs, name) for name in ("items", "item_layers")
        )
        by_seed = [a["nelbo"] - b["nelbo"] for a, b in zip(ours, theirs, strict=True)]
        found.append(
            {
                "rule": rule, "lambda": weight, "ratio": ratio, "paired": compare(ours, theirs),
                "layers": float(layers.mean()), "at_equal": mean_at_zero(items, layers),
                "better": sum(x < 0 for x in by_seed), "seeds": len(by_seed),
            }
        )  # fmt: skip
    adjusted = adjust_by_holm([one["paired"].p_value for one in found])
    return [{**one, "p": p} for one, p in zip(found, adjusted, strict=True)]


def comparison_table(found: list[Row]) -> str:
    def lines():
        for one in found:
            value, low, high = one["at_equal"]
            paired = one["paired"]
            yield (
                one["rule"], f"{one['lambda']:g}", f"{one['ratio']:g}",
                f"{paired.difference:+.4f} ± {paired.stderr:.4f}", f"{one['layers']:+.4f}",
                f"{value:+.4f} [{low:+.4f}, {high:+.4f}]", f"{one['p']:.2g}",
                f"{one['better']} of {one['seeds']}",
            )  # fmt: skip

    head = (
        "rule", "λ", "ratio", "nats", "layers", "nats at equal layers, 95 %", "p (Holm)",
        "seeds in favour",
    )  # fmt: skip
    return table(head, lines())


def verdicts(found: list[Row], baseline: str) -> Iterator[str]:
    """A sentence per rule: where it is better or worse than the baseline, beyond chance."""
    for rule in FITTED:
        own = [one for one in found if one["rule"] == rule]
        if not own:
            continue
        sure = [one for one in own if one["p"] < 0.05]
        better = sum(one["paired"].difference < 0 for one in sure)
        sizes = [one["paired"].difference for one in own]
        yield (
            f"- *{rule}* against *{baseline}*: better in {better}, worse in {len(sure) - better} "
            f"of {len(own)} comparisons (p < 0.05 after Holm); differences from "
            f"{min(sizes):+.4f} to {max(sizes):+.4f} nats."
        )


def best_against_static(rows: Rows) -> Iterator[str]:
    """For every static policy the best routers of the same share, by rule and lambda."""
    depth = rows.settings["layers"]
    for static in rows.of(rule="static"):
        ratio = 1 - static["k"] / depth
        near = [r for r in rows.settings["ratios"] if abs(r - ratio) < 0.002]
        cases = [
            (float(np.mean([row["nelbo"] for row in found])), rule, weight, found)
            for rule, weight, r in itertools.product(FITTED, rows.settings["lambdas"], near)
            if (found := rows.fitted(rule, weight, r))
        ]
        if cases:
            _, rule, weight, found = min(cases, key=lambda case: case[0])
            paired = compare(found, [static])
            flops = float(np.mean([row["flops_share"] for row in found]))
            yield (
                f"- {ratio:.3f} of the layers: the best of {len(cases)} routed cases (*{rule}*, "
                f"λ={weight:g}) less static k={static['k']} is {paired.difference:+.4f} ± "
                f"{paired.stderr:.4f} nats (p={paired.p_value:.2g}, not corrected for the choice), "
                f"at {flops:.3f} of the model's FLOPs against {static['flops_share']:.3f}."
            )


def page(results: Row, answer: str) -> str:
    rows, settings = Rows(results), results["settings"]
    values = {**settings, **results["machine"]}
    values |= {
        "answer": answer,
        "seeds": ", ".join(map(str, settings["seeds"])),
        "tokens": f"{4 * settings['batch'] * settings['length']:,}",
    }
    parts = [
        HEAD.format(**values),
        "## The gap\n",
        "Votes of training: the last validation of the trainings. Layers run at inference: on the "
        "test texts, tau = 0.1. Mean and standard deviation over seeds.\n",
        gap_table(rows),
        "\n![layers run on held-out texts while routers are trained](routers/training.png)\n",
        "## Policies without routers\n",
        base_table(rows),
        "\n## Thresholds fitted to a share of the layers\n",
        "Nats above the full model; in brackets the share of layers on the test texts. Out of "
        f"reach: further than {NEAR:g} from the share that was asked for.\n",
        fitted_table(rows),
    ]
    for baseline in BASELINES:
        found = comparisons(rows, baseline)
        parts += [f"\n## Against *{baseline}*, at equal layers\n"]
        if found:
            parts += [comparison_table(found), "", *verdicts(found, baseline)]
        else:
            parts += ["It reaches no share that another rule reaches."]
    static = list(best_against_static(rows))
    if static:
        parts += ["\n## Against static layers\n", *static]
    return "\n".join(parts) + "\n"


def run(options: argparse.Namespace) -> None:
    results = read_json(Path(options.results))
    require(
        "training" in results, f"{options.results} is not of benchmarks.routers; give its --out"
    )
    Path(options.page).write_text(page(results, options.answer), encoding="utf-8")
    print(f"page: {options.page}")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", help="the --out of benchmarks.routers")
    parser.add_argument("page", help="the Markdown file to write")
    parser.add_argument("--answer", default="See the tables.", help="the answer, in words")


main: Callable[[list[str] | None], int] = make_main("routers_page", __doc__, add_options, run)

if __name__ == "__main__":
    sys.exit(main())
