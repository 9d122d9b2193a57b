"""The page of `benchmarks.families`: `python -m benchmarks.families_page RESULTS.json PAGE.md`.

Its sentences follow from the numbers: a claim is supported where the 95 % intervals of all its
numbers lie above 0 at every size, and not supported where one lies below 0. Figures go to a folder
beside the page, named as it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from benchmarks.command import make_main
from benchmarks.families_claims import (
    ALGORITHM_1,
    FAMILIES,
    PROFILES,
    Finding,
    Results,
    claim_findings,
    correlations,
    find,
    increases,
    kept_likelihood,
    nearer_causal,
    retained,
)
from benchmarks.families_figures import draw_all
from benchmarks.routers_page import spread, table
from dials_jax.errors import require
from dials_jax.files import read_json
from dials_jax.statistics import RankCorrelation
from dials_jax.studies.claims import AT_END, early_excess, judge, recency

HEAD = """# Where redundancy lies: native, causal and continued models on equal data

**Question.** Does the objective of training shape which layers matter (Goel et al.)? Three families
of one shape, trained on the same text for equally many tokens: a masked diffusion model, a causal
one, and a diffusion model continued from the causal one half-way (as Dream: a token is predicted at
the position to its left).

**Answer.** {answer}

Hardware: {device}, {date}, jax {jax}. Sizes (layers x width) {sizes}; seeds {seeds}. Rows of
{length} tokens, a quarter of them the prompt; {prompts} prompts and {study_steps} denoising steps a
profile; {items} held-out texts and {samples} masked copies of each for losses (a causal model's are
exact). Neighbouring masks, and repeated tokens, are alike whatever the model. So cosines of
neighbouring tokens are also those of each text's last model call, of different tokens that are
written. Intervals are of 95 % and cover sequences and seeds; in brackets behind them the value of
each seed. Layers count from 0.

```
{command}
python -m benchmarks.families_page families.json docs/results/representation.md
```
"""
EQUAL = """Equal means tokens: every family has seen as many in all, the continued one first as a
causal model, then as a diffusion model. FLOPs are of layers everywhere and of the head where there
is a loss: at every token of a causal model, at half of a diffusion model's (the masked ones, in the
mean)."""


def page(results: Results, figures: dict[str, Path], folder: Path) -> str:
    values = {**results.settings, **results.machine}
    values |= {"sizes": ", ".join(results.sizes), "seeds": ", ".join(map(str, results.seeds))}
    links = {
        name: f"{path.parent.relative_to(folder)}/{path.name}" for name, path in figures.items()
    }
    parts = [
        HEAD.format(**values, answer=" ".join(answer(results))),
        "## Training\n", EQUAL, "", training_table(results),
        "\n## The claims\n", *claims_part(results),
        f"\n![cosines by depth; a line is a seed]({links['profiles']})",
        f"\n![change by distance]({links['change']})\n",
        change_part(results),
        "\n## During training\n", during_table(results),
        f"\n![layer cosines of models along the way, first seed]({links['training']})",
        "\n## Retention\n", *retention_part(results),
        f"\n![likelihood that is left, against layers left out]({links['retention']})",
        "\n## Does similarity predict what a layer costs?\n", *skipping_part(results),
        f"\n![cost of a layer and its similarity]({links['skipping']})",
    ]  # fmt: skip
    return "\n".join(parts) + "\n"


# -------------------------------------------------------------------------------------- answers


def answer(results: Results) -> Iterator[str]:
    """A sentence per claim, and what similarity predicts."""
    for claim, numbers in over_sizes(results).items():
        yield f"That {claim} is {judge(found for _, found in numbers)}."
    for family in FAMILIES:
        values = [
            correlation
            for size in results.sizes
            for _, what, correlation in correlations(results, size, family)
            if what == ALGORITHM_1
        ]
        yield (
            f"In {family} models the order of Algorithm 1 and the measured cost of a layer have "
            f"rank correlations from {min(c.value for c in values):+.2f} to "
            f"{max(c.value for c in values):+.2f}."
        )


def over_sizes(results: Results) -> dict[str, list[tuple[str, Finding]]]:
    """The size and the number of all that speaks for each claim."""
    found: dict[str, list[tuple[str, Finding]]] = {}
    for size in results.sizes:
        for claim, numbers in claim_findings(results, size).items():
            found.setdefault(claim, []).extend((size, number) for number in numbers)
    return found


def claims_part(results: Results) -> Iterator[str]:
    """A table per claim, by size."""
    for claim, numbers in over_sizes(results).items():
        verdict = judge(found for _, found in numbers)
        yield f"**That {claim}: {verdict}.** Positive numbers speak for it.\n"
        lines = ((size, found.what, str(found)) for size, found in numbers)
        yield table(("size", "number", "value, interval, by seed"), lines) + "\n"


# --------------------------------------------------------------------------------------- tables


def training_table(results: Results) -> str:
    def lines() -> Iterator[tuple[str, ...]]:
        for size in results.sizes:
            native = results.of("trainings", size=size, family="native")[0]["flops"]
            for family in FAMILIES:
                rows = results.of("trainings", size=size, family=family)
                losses = results.of("losses", size=size, family=family)
                first = rows[0]
                yield (
                    size, family, f"{first['parameters'] / 1e6:.1f} M", f"{first['tokens']:,}",
                    f"{first['own_tokens']:,}", f"{first['flops'] / native:.3f}",
                    f"{sum(row['seconds'] for row in rows):.0f}",
                    spread([float(np.mean(row["full"])) for row in losses], ".4f"),
                )  # fmt: skip

    head = (
        "size", "family", "parameters", "tokens in all", "of them in this training",
        "FLOPs in all, native = 1", "seconds here, all seeds", "held-out nats per token",
    )  # fmt: skip
    return table(head, lines())


def change_part(results: Results) -> str:
    """How much states change beside a token that was just revealed, and against far from it."""

    def lines() -> Iterator[tuple[str, ...]]:
        for size in results.sizes:
            for family in ("native", "continued"):
                rows = results.profiles(size, family)
                for i, layer in enumerate(rows[0]["change_layers"]):
                    near, ratio = (
                        np.array([row[name][i] for row in rows], float)
                        for name in ("change_near", "recency_ratio")
                    )
                    yield size, family, str(layer), seen(near, ".4f"), seen(ratio, ".2f")

    head = ("size", "family", "after layer", "change next to it", "near / far")
    return (
        "Change is 1 - cosine of a position's states in two model calls, next to a token that the "
        "former call revealed; near / far is 1 without any recency bias "
        "([how](../representation.md)). A causal model's states never change.\n\n"
        + table(head, lines())
    )


def seen(values: Sequence[float], form: str) -> str:
    """As `spread`, where every seed has a value."""
    return spread(values, form) if np.isfinite(values).all() else "not seen"


def during_table(results: Results) -> str:
    def lines() -> Iterator[tuple[str, ...]]:
        for size in results.sizes:
            for family in FAMILIES:
                for step in results.steps(size, family):
                    layer, token, end = (
                        results.by_sequence(name, size, family, step) for name in PROFILES
                    )
                    nearer = ""
                    if family == "continued":
                        nearer = str(nearer_causal(results, "layer", size, step))
                    yield (
                        size, family, str(step), str(find("", [early_excess(x) for x in layer])),
                        str(find("", [recency(x) for x in token])),
                        str(find("", [recency(x) for x in end])), nearer,
                    )  # fmt: skip

    head = (
        "size", "family", "step", "early less late cosine", "1 - cosine of neighbours",
        f"the same{AT_END}",
        "nearer to the finished causal model than to the native one",
    )  # fmt: skip
    return "Step 0 is before training: random weights, or those of the causal model.\n\n" + table(
        head, lines()
    )


def retention_part(results: Results) -> Iterator[str]:
    """What skipping the k layers of Algorithm 1 costs, neighbours allowed or not."""
    yield (
        "Nats per token that leaving out k layers costs. Algorithm 1 chooses them by similarity "
        "on other held-out text (Goel, Tables 1 to 3 and Figure 1, with likelihood in place of "
        "tasks, which models of this size do not solve). In brackets the value of each seed; no "
        "line where the algorithm finds no k layers without neighbours.\n"
    )

    def lines() -> Iterator[tuple[str, ...]]:
        for size in results.sizes:
            for family in FAMILIES:
                kinds = retained(results, size, family)
                for adjacent, name in ((False, "not allowed"), (True, "allowed")):
                    for k, found in kinds[adjacent].items():
                        layers = "; ".join(", ".join(map(str, own)) for own in found.layers)
                        kept = "{:.3f} [{:.3f}, {:.3f}]".format(*kept_likelihood(found.cost))
                        yield size, family, name, str(k), layers, str(found.cost), kept

    head = (
        "size", "family", "neighbours", "k", "layers, by seed", "nats per token, interval, by seed",
        "likelihood per token that is left",
    )  # fmt: skip
    yield table(head, lines())


def skipping_part(results: Results) -> Iterator[str]:
    """What layers cost, and the rank correlations of what might predict it."""
    yield (
        "Nats per token that leaving out one layer costs, over the layers; the mean over seeds and "
        "its standard deviation.\n"
    )
    yield table(("size", "family", "mean", "cheapest layer", "median"), costs(results))
    yield (
        "\nSpearman's rank correlation over the layers, its interval over sequences (bootstrap) "
        "and p over orders of the layers. 1: the most similar layer is the cheapest; for routers: "
        "what they skip most is most similar, or cheapest.\n"
    )

    def lines() -> Iterator[tuple[str, ...]]:
        for size in results.sizes:
            for family in FAMILIES:
                for seed, what, found in correlations(results, size, family):
                    yield size, family, str(seed), what, show(found), f"{found.p_value:.2g}"

    yield table(("size", "family", "seed", "of", "rank correlation", "p"), lines())


def costs(results: Results) -> Iterator[tuple[str, ...]]:
    for size in results.sizes:
        for family in FAMILIES:
            rows = results.of("losses", size=size, family=family)
            by_layer = [increases(row).mean(axis=0) for row in rows]
            cheapest = ", ".join(str(int(np.argmin(cost))) for cost in by_layer)
            yield (
                size, family, spread([float(c.mean()) for c in by_layer], ".4f"),
                f"{spread([float(c.min()) for c in by_layer], '.4f')} (layer {cheapest})",
                spread([float(np.median(c)) for c in by_layer], ".4f"),
            )  # fmt: skip


def show(found: RankCorrelation) -> str:
    if np.isnan(found.value):
        return "none: all equal"
    return f"{found.value:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"


def run(options: argparse.Namespace) -> None:
    values = read_json(Path(options.results))
    require(
        {"trainings", "losses", "profiles"} <= values.keys(),
        f"{options.results} is not of benchmarks.families; give its --out",
    )
    results, file = Results(values), Path(options.page)
    figures = draw_all(results, file.with_suffix(""))
    file.write_text(page(results, figures, file.parent), encoding="utf-8")
    print(f"page: {file}")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", help="the --out of benchmarks.families")
    parser.add_argument("page", help="the Markdown file to write")


main: Callable[[list[str] | None], int] = make_main("families_page", __doc__, add_options, run)

if __name__ == "__main__":
    sys.exit(main())
