"""The table of an evaluation sweep as text: for the terminal, the page and a paper."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence

from dials_jax.reporting.figure import kind_color
from dials_jax.reporting.publish import Table
from dials_jax.reporting.speed import SpeedCurve, tokens_per_pass
from dials_jax.reporting.sweep_rows import SweepRow
from dials_jax.statistics import mean_and_stderr

WIDTH = 110  # columns of the terminal table
SHORTEST_LABEL = 20  # characters to which a long label may be cut for that
UNKNOWN = "-"

SWEEP_LEGEND = (
    ("value", "The mean over items: nats per token for nelbo (lower is better), accuracy for other "
     "metrics (higher is better). ± is one standard error, the sample standard deviation / √n. It "
     "covers the choice of items, not the seeds of training or of random skipping."),
    ("per token", "Accuracy if choices are compared by log-likelihood per token, not by its sum."),
    ("chance", "What guessing gets in multiple choice: the mean of 1 / number of choices."),
    ("seeds", "Runs that differ only in the seed, of the evaluation or of the router's training, "
     "and ± the standard deviation of their values. Value and tests are then of the items' means "
     "over these seeds."),
    ("95 % interval", "Of one seed: Wilson's interval for accuracies, Student's t for nelbo; it "
     "covers the choice of items. Of several seeds: it covers items and seeds (the variances of "
     "the two are added, Welch-Satterthwaite)."),
    ("vs full", "The mean difference to the full model on the same items, ± its standard error."),
    ("p", "Two-sided paired test against the full model: the exact McNemar test for items scored "
     "0 or 1, a paired t-test otherwise. It is not corrected for the number of rows, and a large p "
     "does not show that two policies are equal."),
    ("items", "Scored items, and of how many if some were left out: their prompt or answer is "
     "too long (too_long=\"drop\"). Published numbers count those as wrong."),
    ("NFE", "Model calls that a sequence took until it was finished, its passes, on average. Calls "
     "made for other sequences of its batch are not counted."),
    ("tokens a pass", "Generated tokens, up to and with the first end of text, / passes, over all "
     "sequences."),
    ("passes a second", "Model calls / seconds: how many passes a sequence gets in a second. Times "
     "tokens a pass, these are the tokens that one sequence gets in a second."),
    ("AUP", "Accuracy under parallelism: the area under accuracy (percent) over tokens a pass. "
     "Points count the less, the worse they are than the best accuracy on these items (d3LLM)."),
    ("layers", "Layers run / layers, the normalised FLOPs of the papers: head, embeddings and "
     "router are left out."),
    ("model", "FLOPs of the whole model as a share of full execution: the head, attention by "
     "length and the router are counted. results.json also holds the absolute number."),
    ("seconds", "Measured time of the run on the device above, without compilation. Speed-up is "
     "the full model's time / this time, where both were measured with the same device, mesh, "
     "layout, batch size and padding. It is one measurement, whose noise is not known, unless "
     "times were repeated (timing_repeats)."),
    ("retention, %", "Value / the full model's value on the same items, with the 95 % interval of "
     "the delta method over items; for accuracies."),
    ("identical, %", "Equivalence rate: outputs that are the full model's token for token, up to "
     "the first end of text, with Wilson's 95 % interval (Student's t over several seeds)."),
    ("KL", "KL(full || policy) in nats per token ± half its 95 % interval (Student's t), of some "
     "items (kl_items), on the full model's own outputs: of a masked diffusion model at randomly "
     "masked tokens of them, of a causal one at every token."),
    ("repeated", "Times of the same few batches, measured for all policies in turns: the median of "
     "the repeats ± half their range, in seconds. Speed-up is then the ratio of the medians; it is "
     "\"in the noise\" where the median lies in the range of the full model's repeats."),
)  # fmt: skip


# ----------------------------------------------------------------------------------------- cells


def _text(value: float | None, spec: str, unit: str = "") -> str:
    return UNKNOWN if value is None or math.isnan(value) else f"{value:{spec}}{unit}"


def _with_error(value: float | None, stderr: float | None, sign: str = "") -> str:
    mean, error = _text(value, f"{sign}.4f"), _text(stderr, ".4f")
    return mean if error == UNKNOWN else f"{mean} ±{error}"


def _median_and_range(row: SweepRow) -> str:
    if not row.num_timings:
        return UNKNOWN
    return f"{row.timed_median:.3g} ±{(row.timed_high - row.timed_low) / 2:.2g}"


def p_text(p_value: float | None) -> str:
    return "<0.001" if p_value is not None and p_value < 0.001 else _text(p_value, ".3f")


# How each column writes its cell, on the terminal and on the page.
Columns = dict[str, Callable[[SweepRow], str]]
COLUMNS: Columns = {
    "policy": lambda r: r.policy,
    "value": lambda r: _with_error(r.value, r.stderr),
    "vs full": lambda r: _with_error(r.difference, r.difference_stderr, "+"),
    "p": lambda r: p_text(r.p_value),
    "layers": lambda r: _text(r.layers_run, ".4f"),
    "model": lambda r: _text(r.flops_share, ".4f"),
    "seconds": lambda r: _text(r.seconds, ".1f"),
    "speed-up": lambda r: "in the noise" if r.in_noise else _text(r.speedup, ".2f", "x"),
    "items": lambda r: _item_count(r),
}
SEEDS = {
    "seeds": lambda r: f"{r.num_seeds}{'' if r.seed_stdev is None else f' ±{r.seed_stdev:.4f}'}"
}
ONCE = "seconds once"  # instead of "seconds" where no time was measured again
REPEATED = {"repeated": lambda r: _median_and_range(r)}
PER_TOKEN = {"per token": lambda r: _text(r.per_token, ".4f")}
INTERVAL = {"95 % interval": lambda r: f"{_text(r.low, '.4f')} to {_text(r.high, '.4f')}"}
PASSES = {
    "NFE": lambda r: _text(r.nfe, ".1f"),
    "tokens a pass": lambda r: _text(r.tokens_per_pass, ".2f"),
    "passes a second": lambda r: _text(r.passes_per_second, ".1f"),
}


AGAINST_FULL = {
    "retention, %": lambda r: percent_interval(r.retention, r.retention_low, r.retention_high),
    "identical, %": lambda r: percent_interval(
        r.equivalence, r.equivalence_low, r.equivalence_high
    ),
    "KL": lambda r: _with_error(r.kl, None if r.kl is None else (r.kl_high - r.kl_low) / 2),
}


def percent_interval(value: float | None, low: float | None, high: float | None) -> str:
    """A share in percent with its 95 % interval: `98.1 [95.0, 101.2]`."""
    if value is None:
        return UNKNOWN
    ends = "" if math.isnan(low) else f" [{100 * low:.1f}, {100 * high:.1f}]"
    return f"{100 * value:.1f}{ends}"


def _columns(rows: Sequence[SweepRow]) -> dict[str, Callable[[SweepRow], str]]:
    """The columns of these rows: those of seeds and repeated times where a row has several."""
    columns = COLUMNS | (SEEDS if any(row.num_seeds > 1 for row in rows) else {})
    if any(row.num_timings for row in rows):
        return columns | REPEATED
    return {ONCE if name == "seconds" else name: text for name, text in columns.items()}


def format_table(rows: Sequence[SweepRow]) -> str:
    """Formats the table for a terminal: a heading per task, and an aligned line per policy."""
    columns = _columns(rows)
    cells = [[text(row) for text in columns.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    max_label = WIDTH - sum(widths[1:]) - 2 * len(widths)
    widths[0] = min(widths[0], max(max_label, SHORTEST_LABEL))

    def line(label: str, *numbers: str) -> str:
        aligned = [number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True)]
        return "  " + "  ".join([_shorten(label, widths[0]).ljust(widths[0]), *aligned])

    text, task = [line(*columns)], None
    for row, row_cells in zip(rows, cells, strict=True):
        if row.task != task:
            task = row.task
            own = [x for x in rows if x.task == task]
            text += textwrap.wrap(f"{task} ({_describe_task(own)})", WIDTH)
        text.append(line(*row_cells))
    return "\n".join(text)


def _describe_task(rows: Sequence[SweepRow]) -> str:
    """The metric of a task's rows, how its texts are generated, in batches of which size, and how
    many items are left out."""
    row = rows[0]
    parts = [row.metric]
    if row.sampler is not None:
        steps = "" if row.steps is None else f", {row.steps} steps"
        temperature = "" if row.temperature is None else f", temperature {row.temperature:g}"
        parts += [f"sampler {row.sampler}{temperature}{steps}"]
    if row.sampler is not None or row.cache != "none":
        parts += [f"cache {row.cache}"]
    if row.stop is not None:
        parts += [row.stop]
    if row.chance is not None:
        parts += [f"chance {row.chance:.4f}"]
    if row.num_samples is not None:
        parts += [f"{row.num_samples} samples per item"]
    parts += _describe_batches(rows)
    if row.num_dropped:
        total = row.num_items + row.num_dropped
        parts += [f"{row.num_dropped} of {total} items left out: too long"]
    return ", ".join(parts)


def _describe_batches(rows: Sequence[SweepRow]) -> list[str]:
    """The batch sizes of a task's rows. Not of what is the same in every batch: that is said."""
    sizes = dict.fromkeys(size for row in rows for size in (row.batch_size or "").split())
    if [*sizes] == ["any"]:
        return ["batch-invariant"]
    plural = "s" if len(sizes) > 1 else ""
    return [f"batch size{plural} {' and '.join(sizes)}"] if sizes else []


def _item_count(row: SweepRow) -> str:
    """Scored items; where some were left out, also of how many."""
    total = row.num_items + (row.num_dropped or 0)
    return f"{row.num_items} of {total}" if row.num_dropped else str(total)


def _shorten(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def speed_table(curves: Mapping[str, Sequence[SpeedCurve]]) -> Table:
    """Makes the table of curves of accuracy against tokens per pass: a heading per set of items."""
    lines, headings = [], {}
    for title, found in curves.items():
        headings[len(lines)] = title, f"{len(found[0].runs[0]['items'])} items"
        for curve in found:
            speeds = [tokens_per_pass(run) for run in curve.runs]
            ends = f"{speeds[0]:.2f} to {speeds[-1]:.2f}"
            values = [mean_and_stderr(list(run["items"].values()))[0] for run in curve.runs]
            accuracies = f"{values[0]:.4f} to {values[-1]:.4f}"
            lines.append((curve.label, str(len(speeds)), ends, accuracies, f"{curve.aup:.1f}"))
    header = ("sampler's setting", "points", "tokens a pass", "accuracy", "AUP")
    return Table(header, lines, headings)


def page_table(rows: Sequence[SweepRow]) -> Table:
    """Makes the table of the page: a heading per task, and a line per policy."""
    generated = any(row.tokens_per_pass is not None for row in rows)
    columns = _columns(rows) | INTERVAL | (PASSES if generated else {}) | _against_full(rows)
    return _table(rows, _with_per_token(rows, columns))


def paper_table(rows: Sequence[SweepRow]) -> Table:
    """Makes the table of results.tex: what a paper shows."""
    left_out = ("seconds", ONCE, "items")
    columns = {name: text for name, text in _columns(rows).items() if name not in left_out}
    return _table(rows, _with_per_token(rows, columns | _against_full(rows)))


def _against_full(rows: Sequence[SweepRow]) -> Columns:
    """What compares with the full model, where static policies are: the columns with values."""
    if not any(row.kind == "static" for row in rows):
        return {}
    unknown = {name for name, text in AGAINST_FULL.items() if {*map(text, rows)} == {UNKNOWN}}
    return {name: text for name, text in AGAINST_FULL.items() if name not in unknown}


def _with_per_token(rows: Sequence[SweepRow], columns: Columns) -> Columns:
    """Adds the accuracy per token beside the accuracy, where a row has one."""
    if all(row.per_token is None for row in rows):
        return columns
    names = ("policy", "value")
    first = {name: text for name, text in columns.items() if name in names}
    return first | PER_TOKEN | columns


def _table(rows: Sequence[SweepRow], columns: Columns) -> Table:
    starts = [i for i, row in enumerate(rows) if i == 0 or row.task != rows[i - 1].task]
    return Table(
        tuple(columns),
        [[text(row) for text in columns.values()] for row in rows],
        headings={
            first: (rows[first].task, _describe_task(rows[first:end]))
            for first, end in zip(starts, [*starts, len(rows)][1:], strict=True)
        },
        colors=[kind_color(row.kind) for row in rows],
    )
