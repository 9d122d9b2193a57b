"""The kinds of files that commands read, and what reads them."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import dials_jax as dj
from dials_jax import digests
from dials_jax.config import to_dict
from dials_jax.data.sources import load_training_data
from dials_jax.data.tokenizer import load_tokenizer
from dials_jax.evaluation.compare_sweeps import read_sweep
from dials_jax.studies.study import run_study
from dials_jax.training.loop import train
from tests.faults import jobs, processes
from tests.faults.damage import copy_of


@dataclass(frozen=True)
class Target:
    """A kind of file.

    Attributes:
      files: patterns of its files within `state`.
      state: a folder that is copied for each case.
      use: reads the copy; gives what has to be equal.
      noted: it was read once before the damage, and found whole, which is noted by its date.
    """

    name: str
    state: str
    files: tuple[str, ...]
    use: Callable[[Path], Any]
    noted: bool = False

    def found(self, folder: Path) -> list[Path]:
        paths = {path for pattern in self.files for path in folder.glob(pattern)}
        return sorted(path for path in paths if path.is_file() and path.stat().st_size)


def make_states(base: Path, states: Path) -> None:
    """Folders of commands that were killed half-way, and of finished ones."""
    known = jobs.make_jobs(base)
    half = {
        "training of a model": lambda folder: (folder / "checkpoints/00000008").exists(),
        "sweep": lambda folder: (folder / "results.json").exists(),
        "study": lambda folder: len(jobs.recorded(folder)) > 5,
        "lm-eval": lambda folder: len(jobs.recorded(folder)) > 3,
    }
    states.mkdir()
    for name, condition in half.items():
        workdir, run = states / f"half {name}", known[name].run
        child = processes.start(partial(run, workdir), states / "half.txt")
        child.wait_until(partial(condition, workdir))
        assert child.send(signal.SIGKILL), child.text()
        child.wait()
        processes.do(partial(run, states / name), states / "whole.txt")
    for name in ("model", "router", "corpus"):
        copy_of(base / name, states / name)
    (states / "text").mkdir()
    processes.do(lambda: rows_of_text(base, states / "text"), states / "text.txt")
    records = {"reader": "grain"}
    processes.do(lambda: jobs.prepare(base, states / "records", **records), states / "records.txt")
    (states / "answers").mkdir()
    processes.do(lambda: answers(base, states / "answers", 2), states / "answers.txt")


def rows_of(data: Any) -> str:
    """A digest of all rows, read batch by batch as training does."""
    batches = np.array_split(np.arange(data.num_rows), 8)
    return "".join(digests.digest_hex({"rows": data.rows(batch)[0]})["rows"] for batch in batches)


def rows_of_corpus(base: Path, folder: Path, **changes: Any) -> str:
    cfg = jobs.corpus(base, folder, **changes)
    return rows_of(load_training_data(cfg, jobs.tiny())[0])


def rows_of_text(base: Path, folder: Path) -> str:
    return rows_of(load_training_data(jobs.text_data(base, folder), jobs.tiny())[0])


PROMPTS = ["s37,58=", "r12,34=", "s11,22=", "r98,76="]


def answers(base: Path, folder: Path, count: int = 4) -> Any:
    """Answers in a file that goes on."""
    from dials_jax.cli.main import start

    prompts = [part for prompt in PROMPTS[:count] for part in ("--prompt", prompt)]
    arguments = ["--max-new-tokens", "4", "--steps", "4", "--batch-size", "1"]
    out = folder / "answers.jsonl"
    start("generate", str(base / "model"), *prompts, "--out", str(out), *arguments)
    return sorted(jobs.lines_of(out))


def texts_of(folder: Path) -> Any:
    """What a model is and says."""
    model = dj.load(folder / "model")
    said = dj.generate_text(model, PROMPTS[:2], max_new_tokens=4)
    ids = load_tokenizer(folder / "model").encode("r0123456789=")
    return to_dict(model.config), digests.digest_hex(model.params), [x.text for x in said], ids


def router_of(base: Path, folder: Path) -> Any:
    model = dj.load(base / "model")
    router = dj.load_router(folder, model)
    return digests.digest_hex(router.router), router.threshold, router.votes, router.threshold


def scored_again(base: Path, folder: Path) -> Any:
    workdir = jobs.fresh(folder.with_name("scored again"))
    cfg = jobs.schedules(base, samples=str(folder))
    jobs.without_figures(lambda place: run_study(cfg, place))(workdir)
    found = jobs.reported(workdir)
    found["results"]["config"].pop("samples")
    return found


def trained_in(base: Path) -> Callable[[Path], Any]:
    def use(folder: Path) -> Any:
        train(jobs.training(base), folder)
        return jobs.trained(folder)

    return use


def finished(base: Path, name: str) -> Callable[[Path], Any]:
    job = jobs.make_jobs(base)[name]

    def use(folder: Path) -> Any:
        job.run(folder)
        return job.result(folder)

    return use


def sweep_results(folder: Path) -> Any:
    found = dj.load_results(folder)
    return jobs.without_times(dict(found)), jobs.without_times(read_sweep(folder))


def study_results(folder: Path) -> Any:
    found = dj.load_results(folder)
    return jobs.without_times(dict(found)), found.rows


def make_targets(base: Path) -> list[Target]:
    def prepare_again(folder: Path) -> Any:
        jobs.prepare(base, folder, reader="grain")
        return jobs.bytes_below(folder, ("files.json", "array_record"))

    train_on = trained_in(base)
    half, model = "half training of a model", "half training of a model"
    harness, sweep, study = "half lm-eval", "half sweep", "half study"
    grain = {"reader": "grain"}
    return [
        Target("a training's config.json", half, ("config.json",), train_on),
        Target("a checkpoint's arrays", half, ("checkpoints/*/state/**/*",), train_on),
        Target("a checkpoint's digest.json", half, ("checkpoints/*/digest.json",), train_on),
        Target("metrics.jsonl, continued", model, ("metrics.jsonl",), train_on),
        Target(
            "metrics.jsonl, shown", "training of a model", ("metrics.jsonl",),
            lambda folder: {"metrics": [str(jobs.without_times(x)) for x in rows_shown(folder)]},
        ),
        Target(
            "a corpus's packed rows", "corpus", ("parts/*.npy",),
            lambda folder: rows_of_corpus(base, folder),
            noted=True,
        ),
        Target(
            "a corpus's manifest.json", "corpus", ("manifest.json",),
            lambda folder: rows_of_corpus(base, folder),
        ),
        Target(
            "a corpus's files.json", "corpus", ("files.json",),
            lambda folder: rows_of_corpus(base, folder),
        ),
        Target(
            "a corpus's ArrayRecord", "records", ("array_record/*",),
            lambda folder: rows_of_corpus(base, folder, **grain),
        ),
        Target(
            "a corpus prepared again", "records",
            ("settings.json", "parts/*", "manifest.json", "tokenizer.json"), prepare_again,
        ),
        Target(
            "packed text of a cache", "text", ("*.npy", "*.json"),
            lambda folder: rows_of_text(base, folder),
        ),
        Target("a model's config.json", "model", ("model/config.json",), texts_of),
        Target("a model's arrays", "model", ("model/params/**/*",), texts_of),
        Target("a model's tokenizer.json", "model", ("model/tokenizer.json",), texts_of),
        Target(
            "a router's config.json", "router", ("router/config.json",),
            lambda folder: router_of(base, folder),
        ),
        Target(
            "a router's arrays", "router", ("router/params/**/*",),
            lambda folder: router_of(base, folder),
        ),
        Target("a sweep's sweep.json", sweep, ("sweep.json",), finished(base, "sweep")),
        Target("a sweep's runs.jsonl", sweep, ("runs.jsonl",), finished(base, "sweep")),
        Target("a sweep's results.json, continued", sweep, ("results.json",),
               finished(base, "sweep")),
        Target("a sweep's results.json, shown", "sweep", ("results.json",), sweep_results),
        Target("a study's study.json", study, ("study.json",), finished(base, "study")),
        Target("a study's runs.jsonl", study, ("runs.jsonl",), finished(base, "study")),
        Target(
            "a study's samples, scored again", "study", ("samples/*", "runs.jsonl"),
            lambda folder: scored_again(base, folder),
        ),
        Target(
            "a study's results, shown", "study", ("results.json", "results.csv"), study_results
        ),
        Target("lm-eval's harness.json", harness, ("harness.json",), finished(base, "lm-eval")),
        Target("lm-eval's kept answers", harness, ("answers/*/*",), finished(base, "lm-eval")),
        Target(
            "a file of answers", "answers", ("answers.jsonl", "answers.settings.json"),
            lambda folder: answers(base, folder),
        ),
    ]  # fmt: skip


def rows_shown(folder: Path) -> list[dict[str, Any]]:
    return dj.load_results(folder / "metrics.jsonl").rows
