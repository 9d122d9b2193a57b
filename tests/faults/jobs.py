"""The tiny commands that faults are injected into, what each needs, and what of it has to be equal.

Everything is made from seeds in a folder `base`; a command gets a workdir of its own.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from dials_jax import mirror
from dials_jax.config import (
    ArithmeticData,
    CorpusData,
    EvalConfig,
    EvalTask,
    HarnessConfig,
    HarnessModel,
    ObjectiveConfig,
    OptimizerConfig,
    RouterConfig,
    ScheduleStudy,
    TextData,
    TrainConfig,
)
from dials_jax.data import packing
from dials_jax.data import prepare as preparing
from dials_jax.data.arithmetic import ArithmeticTask
from dials_jax.data.prepare import prepare_corpus
from dials_jax.evaluation.sweep import sweep
from dials_jax.files import read_json
from dials_jax.models import families
from dials_jax.models.folders import save_model
from dials_jax.records import parse_line
from dials_jax.reporting import publish
from dials_jax.sampling.confidence import Confidence
from dials_jax.studies.study import run_study
from dials_jax.training.loop import train
from tests.bucket_servers import NAME, SERVERS
from tests.faults import processes

ROWS = ArithmeticData(num_items=100)
STEPS, SAVE_EVERY = 16, 4
# Of measured time, or where and when something ran: equal runs differ in them.
OF_TIME = {
    *("seconds", "compile_seconds", "tokens_per_second", "measured", "environment", "commands"),
    *("started", "date", "start_time", "end_time", "total_evaluation_time_seconds", "digest"),
    *("csv_sha256", "saved_time", "pretty_env_info", "git_hash", "upper_git_hash", "store"),
}


@dataclass(frozen=True)
class Job:
    """A command.

    Attributes:
      run: does it in a workdir, from where it is.
      result: what has to be equal however often the command was stopped.
      saved: what it has reported as saved: content by name.
    """

    name: str
    run: Callable[[Path], Any]
    result: Callable[[Path], Any]
    saved: Callable[[Path], dict[str, Any]]


def tiny(causal: bool = False):
    return families.mdlm_small(
        2, 32, 19, mask_id=18, eos_id=1, pad_id=0, max_length=32, dtype="float32", causal=causal
    )


def make_base(base: Path) -> None:
    """A text, a tokenizer, a prepared corpus, models, a router and tasks of lm-eval."""
    from tests.evaluation.harness_cases import write_demo_tasks

    make_text(base)
    prepare(base, base / "corpus")
    train(training(base), base / "model")
    train(training(base, backbone=str(base / "model"), data=ROWS), base / "router")
    params = make_scorer_params()
    files = [base / "tokenizer.json"]
    save_model(base / "scorer", tiny(causal=True), params, tokenizer_files=files)
    (base / "tasks").mkdir()
    write_demo_tasks(base / "tasks")


def make_text(base: Path) -> None:
    base.mkdir(parents=True)
    random = np.random.default_rng(0)
    lines = ["".join(map(str, random.integers(0, 10, n))) for n in random.integers(20, 60, 120)]
    text = "".join(json.dumps({"text": line}) + "\n" for line in lines)
    (base / "text.jsonl").write_text(text)
    ArithmeticTask(ROWS).tokenizer.save(base)


def make_scorer_params():
    import jax

    from dials_jax.models import transformer

    return jax.jit(transformer.init, static_argnums=0)(tiny(causal=True), jax.random.key(1))


def corpus(base: Path, folder: Path, **changes: Any) -> CorpusData:
    settings = {"length": 16, "num_validation": 8, "reader": "numpy"} | changes
    paths, tokenizer = (str(base / "text.jsonl"),), str(base / "tokenizer.json")
    return CorpusData(folder=str(folder), paths=paths, tokenizer=tokenizer, **settings)


def prepare(base: Path, folder: Path, **changes: Any) -> None:
    """With parts of 8 documents, so that there are many."""
    with (
        mock.patch.object(packing, "BATCH_DOCUMENTS", 4),
        mock.patch.object(preparing, "BATCH_DOCUMENTS", 4),
        mock.patch.object(preparing, "PART_BATCHES", 2),
    ):
        prepare_corpus(corpus(base, folder, **changes), tiny())


def training(base: Path, **changes: Any) -> TrainConfig:
    """A model on the prepared corpus, or with `backbone` routers."""
    subject = {} if "backbone" in changes else {"model": tiny(), "dropout": 0.1}
    settings = {
        "router": RouterConfig(d_hidden=8, execute_bias=0.5),
        "data": corpus(base, base / "corpus"),
        "optimizer": OptimizerConfig(learning_rate=1e-2, num_steps=STEPS, warmup_steps=2, ema=0.9),
        "objective": ObjectiveConfig(kind="mdlm"),
        "batch_size": 8,
        "log_every": 3,
        "save_every": SAVE_EVERY,
    }
    return TrainConfig(**settings | subject | changes)


def text_data(base: Path, cache_folder: Path) -> TextData:
    return TextData(
        paths=(str(base / "text.jsonl"),), tokenizer=str(base / "tokenizer.json"), length=16,
        cache=str(cache_folder),
    )  # fmt: skip


def evaluation(base: Path) -> EvalConfig:
    data, sampler = ArithmeticData(num_items=40), Confidence(4)
    return EvalConfig(
        model=str(base / "model"),
        tasks=(EvalTask(name="sums", metric="exact_match", data=data, limit=24, sampler=sampler),),
        routers=(str(base / "router"),),
        num_static=(),
        num_random=(),
        batch_size=2,
    )


def schedules(base: Path, **changes: Any) -> ScheduleStudy:
    models = (("H", str(base / "model")), ("L", str(base / "model")))
    settings = {
        "models": models, "static_layers": (("L", "1"),), "scorer": str(base / "scorer"),
        "retokenize": "never", "schedules": ("H4", "L1,H3", "H3,L1"), "length": 12,
        "steps": 4, "num_samples": 8, "batch_size": 2, "dtype": "float32", "layout": "stacked",
    }  # fmt: skip
    return ScheduleStudy(**settings | changes)


def run_harness(base: Path, workdir: Path) -> None:
    from dials_jax.evaluation.harness_run import run_harness

    model = HarnessModel(
        path=str(base / "model"), sampler=Confidence(4), num_samples=4, batch_size=2, max_programs=2
    )
    cfg = HarnessConfig(
        model=model, tasks=("demo_text", "demo_choice"), num_fewshot=0, limit=8,
        include_path=str(base / "tasks"), include_defaults=False, bootstrap_iters=0,
    )  # fmt: skip
    run_harness(cfg, workdir)


def without_figures(run: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """Drawing takes most of the time of a tiny run, and is not what is counted."""

    def quick(workdir: Path) -> Any:
        with mock.patch.object(publish, "draw_figures", lambda figures, folder: {}):
            return run(workdir)

    return quick


# ----------------------------------------------------------------------------- what has to be equal


def without_times(values: Any) -> Any:
    if isinstance(values, dict):
        return {k: without_times(v) for k, v in values.items() if k not in OF_TIME}
    return [without_times(x) for x in values] if isinstance(values, list) else values


def lines_of(path: Path) -> list[str]:
    """Whole lines without their times."""
    found = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.dumps(without_times(parse_line(line)[0]), sort_keys=True) for line in found]


def bytes_below(folder: Path, but: tuple[str, ...] = ()) -> dict[str, str]:
    """Digests of files by name, except those whose name has a part in `but`."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part in str(path.relative_to(folder)) for part in but)
    }


def trained(workdir: Path) -> dict[str, Any]:
    """The last state bit by bit, all metrics, and the exported model or router."""
    kind = "router" if (workdir / "router").exists() else "model"
    exported = read_json(workdir / kind / "config.json")
    return {
        "state": read_json(workdir / f"checkpoints/{STEPS:08d}/digest.json"),
        "metrics": lines_of(workdir / "metrics.jsonl"),
        "exported": exported["digests"],
        "left over": sorted(p.name for p in workdir.rglob("*") if p.suffix in (".tmp", ".partial")),
    }


def checkpoints(workdir: Path) -> dict[str, Any]:
    """The steps that have their final name."""
    found = (workdir / "checkpoints").glob("*/digest.json")
    return {p.parent.name: p.parent.name for p in found if p.parent.name.isdecimal()}


def prepared(folder: Path) -> dict[str, Any]:
    """Every byte, but for dates of files and for what tensorflow-datasets writes."""
    return bytes_below(folder, ("files.json", "dataset_info.json"))


def mirrored_training(base: Path, scheme: str) -> Job:
    """A training with a copy in a bucket: every workdir's name has a place of its own there.

    The copy is what has to last: a workdir is lost with its machine.
    """

    def address(workdir: Path) -> str:
        return f"{scheme}://{NAME}/{workdir.name}"

    def run(workdir: Path) -> None:
        often = mock.patch.object(mirror, "PERIOD", 0.1)  # a whole training takes some seconds
        with often, mirror.mirrored(workdir, address(workdir)):
            train(training(base), workdir)

    def copy(workdir: Path) -> Path:
        """What the bucket holds, as `dials copy` fetches it."""
        from dials_jax.cli.main import start

        folder, log = fresh(workdir.with_name("copy")), workdir.with_name("copy.txt")
        # In a process of its own: the packages of buckets start threads.
        child = processes.start(partial(start, "copy", address(workdir), str(folder)), log)
        assert child.wait() == 0 or "holds nothing" in child.text(), child.text()
        return folder

    def result(workdir: Path) -> dict[str, Any]:
        here = bytes_below(workdir, (mirror.OWN,)).items()
        there = bytes_below(copy(workdir), (mirror.OWN,)).items()
        return {"not as in the bucket": sorted(here ^ there), **trained(workdir)}

    name = f"training of a model, mirrored in {scheme}"
    return Job(name, run, result, lambda workdir: checkpoints(copy(workdir)))


def noted(workdir: Path) -> dict[str, Any]:
    """The steps that a mirrored workdir says are in its bucket."""
    note = workdir / mirror.MIRROR_STATE
    sent = read_json(note)["sent"] if note.exists() else {}
    seals = [Path(name) for name in sent if name == mirror.seal_of(name)]
    return {x.parent.name: x.parent.name for x in seals if x.parent.name.isdecimal()}


def parts(folder: Path) -> dict[str, Any]:
    """Parts that have an entry: content, and the file itself, which is never written again."""
    return {
        file.name: (digest_of(file.with_suffix(".npy")), file.stat().st_ino)
        for file in folder.glob("parts/*.json")
    }


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def recorded(workdir: Path) -> dict[str, Any]:
    """Whole lines of every runs.jsonl, whose times must stay as well."""
    return {
        f"{path.relative_to(workdir)}, {line[-20:]!r}": line
        for path in workdir.rglob("runs.jsonl")
        for line in path.read_bytes().split(b"\n")[:-1]
    }


def reported(workdir: Path) -> dict[str, Any]:
    left = [path.name for path in workdir.rglob("*.tmp")]
    return {"results": without_times(read_json(workdir / "results.json")), "left over": left}


def evaluated(workdir: Path) -> dict[str, Any]:
    samples = {p.name: lines_of(p) for p in sorted((workdir / "samples").glob("*.jsonl"))}
    return {"samples": samples, **reported(workdir)}


@cache
def make_jobs(base: Path) -> dict[str, Job]:
    def routers(workdir):
        return train(training(base, backbone=str(base / "model"), data=ROWS), workdir)

    def model(workdir):
        return train(training(base), workdir)

    jobs = [
        Job("training of a model", model, trained, checkpoints),
        Job("training of routers", routers, trained, checkpoints),
        Job("preparation", partial(prepare, base), prepared, parts),
        Job("sweep", without_figures(partial(sweep, evaluation(base))), reported, recorded),
        Job("study", without_figures(partial(run_study, schedules(base))), reported, recorded),
        Job("lm-eval", partial(run_harness, base), evaluated, recorded),
        *(mirrored_training(base, scheme) for scheme in SERVERS),
    ]
    return {job.name: job for job in jobs}


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return folder
