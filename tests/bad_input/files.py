"""Entry points that read files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from hypothesis import strategies as st

from dials_jax.config import EvalTask, TaskData, TrainConfig, to_dict
from dials_jax.config_files import load_config
from dials_jax.convert.hugging_face import open_hugging_face
from dials_jax.convert.safetensors_reader import INDEX_FILE, open_safetensors, open_tensors
from dials_jax.data.corpus import MANIFEST, load_corpus
from dials_jax.data.records import read_documents
from dials_jax.data.tokenizer import load_tokenizer
from dials_jax.errors import require
from dials_jax.evaluation.compare_sweeps import read_sweep
from dials_jax.evaluation.items import load_items
from dials_jax.evaluation.sweep_records import check_record
from dials_jax.loading import load, read_config
from dials_jax.records import Records, require_sound
from dials_jax.reporting.results import load_results
from dials_jax.skipping.storage import load_router
from dials_jax.training.run import require_own
from dials_jax.training.run import require_same_experiment as require_same
from tests.bad_input.run import EntryPoint
from tests.bad_input.values import (
    Case,
    broken_json,
    damaged_json,
    damaged_lines,
    edited_json,
    json_bytes,
)
from tests.bad_input.world import CONFIG_FILE, GOLDEN, MODEL, STORED_SWEEP, TRAINING, stored
from tests.reporting.sweep_results import make_results

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
# Everything that the format forbids, in the header of a file with 16 bytes of data.
FORBIDDEN = (
    {"a": F32, "b": F32}, {"a": F32}, {"a": F32 | {"data_offsets": [8, 16]}},
    *({"a": F32, "b": F32 | {"data_offsets": [8, 16]} | change} for change in (
        {"shape": "2"}, {"shape": [2.0]}, {"shape": ["2"]}, {"shape": [-2]}, {"shape": [True, 2]},
        {"shape": [2**62, 4]}, {"shape": [3]}, {"shape": None}, {"dtype": ["F32"]}, {"dtype": "x"},
        {"dtype": None}, {"dtype": 4}, {"data_offsets": [16, 8]}, {"data_offsets": [8.0, 16.0]},
        {"data_offsets": [4, 12]}, {"data_offsets": [8]}, {"data_offsets": "x"},
        {"data_offsets": [-8, 0]}, {"data_offsets": [8, 2**70]}, {"data_offsets": {}},
    )),
    {"a": F32, "b": 3}, {"a": F32, "b": []}, {"a": F32, "b": None},
)  # fmt: skip
SHARD_NAMES = (
    "../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "x", "a\0.safetensors", 3,
    None, [], {}, True, "a" * 300 + ".safetensors", "\\x.safetensors", "none.safetensors",
)  # fmt: skip


METRICS = [{"step": i, "loss": 1.0, "skip_rate": 0.5} for i in range(1, 5)]


def safetensors(header: bytes, data: bytes = bytes(16)) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


@st.composite
def damaged_safetensors(draw):
    right = {"a": F32, "b": F32 | {"data_offsets": [8, 16]}}
    how = draw(st.sampled_from(["header", "forbidden", "length", "cut", "edited"]))
    if how == "edited":
        case = draw(edited_json(right))
        return Case(safetensors(json_bytes(case.value)), case.wrong)
    if how == "header":
        return Case(safetensors(draw(broken_json(right)).value), True)
    if how == "forbidden":
        return Case(safetensors(json_bytes(draw(st.sampled_from(FORBIDDEN)))), True)
    whole = safetensors(json_bytes(right))
    if how == "cut":
        return Case(whole[: draw(st.integers(0, len(whole) - 1))], True)
    length = draw(st.integers(0, 2**64 - 1).filter(lambda n: n != len(whole) - 24))
    return Case(length.to_bytes(8, "little") + whole[8:], True)


@st.composite
def damaged_index(draw):
    index = stored(GOLDEN / "llada_tiny" / INDEX_FILE)
    if draw(st.booleans()):
        return draw(damaged_json(index, ("weight_map",)))
    name = draw(st.sampled_from(sorted(index["weight_map"])))
    index["weight_map"][name] = draw(st.sampled_from(SHARD_NAMES))
    return Case(json_bytes(index), True)


@st.composite
def damaged_config_file(draw):
    wrong = (
        "exit()", "raise SystemExit(0)", "1/0", "import none_such", "x(",
        "def get_config(x): pass",
        "\0", "def get_config(): return 3", "get_config = 3",
        "def get_config(): return get_config()",
        "raise KeyboardInterruptt", "from dials_jax.config import None_Such", "  x = 1", "'''",
        "def get_config(): return TrainConfig()", "def get_config(): raise Exception('a\\nb')",
        "def get_config(): return TrainConfig(modle=1)", "def get_config(): yield 1",
        "def get_config(): assert False", "class E(Exception):\n def __str__(s): 1/0\nraise E",
        "raise BaseException('x')", "raise GeneratorExit",
        "raise ExceptionGroup('x', [Exception()])",
    )  # fmt: skip
    how = draw(st.sampled_from(["line", "bytes", "cut", "number"]))
    if how == "line":
        return Case((CONFIG_FILE + draw(st.sampled_from(wrong)) + "\n").encode(), True)
    if how == "bytes":
        odd = draw(st.sampled_from([b"\xff", b"\xff\xfe", b"\0", b"\x80abc"]))
        return Case(CONFIG_FILE.encode() + odd, True)
    if how == "cut":
        return Case(CONFIG_FILE[: draw(st.integers(0, 200))].encode(), True)
    old = draw(st.sampled_from(["=2", "=16", "=19", "=18", "=1,", "=0,", "=32", "=100", "=4"]))
    new = draw(st.sampled_from(["'x'", "None", "-1", "10**30", "[]", "1e400", "object()", "b''"]))
    text = CONFIG_FILE.replace(old, f"={new}{',' * old.endswith(',')}", 1)
    return Case(text.encode(), False)


def file_entries(world: SimpleNamespace) -> list[EntryPoint]:
    """Entry points, each of which reads a file that a case replaces."""
    place = world.folder

    def entry(name, cases, path, read, weight=1.0):
        def take(data: bytes):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            read(path)

        return EntryPoint(name, cases, take, weight, path.read_bytes() if path.exists() else None)

    single = place / "single" / "x.safetensors"
    copies = {name: _copied(place, name) for name in ("model", "router", "corpus")}
    index = _linked(GOLDEN / "llada_tiny", place / "index", INDEX_FILE)
    published = _linked(GOLDEN / "llada_tiny", place / "published", "config.json")
    info, facts = stored(place / "model/config.json"), stored(place / "router/config.json")
    manifest = stored(place / "corpus" / MANIFEST)
    for described in (
        info,
        facts,
        manifest,
    ):  # without it, as in earlier versions, what was edited is read
        described.pop("digest", None)
    known = tuple(name for name in info if name not in ("weights",))
    of_router = tuple(name for name in facts if name not in ("version", "fitted"))
    config = damaged_json(info, known, typed=True)
    return [
        entry("configuration files", damaged_config_file(), place / "c.py", _load_training, 1.5),
        entry("safetensors headers", damaged_safetensors(), single, open_safetensors, 1.5),
        entry("shard index", damaged_index(), index, lambda x: open_tensors(x.parent)),
        entry("config.json of a model", config, copies["model"], lambda x: read_config(x.parent)),
        entry("model folder", config, copies["model"], lambda x: load(x.parent), 0.2),
        entry("published config.json", damaged_json(stored(GOLDEN / "llada_tiny/config.json")),
              published, lambda x: open_hugging_face(x.parent, None)),
        entry("router folder", damaged_json(facts, of_router, typed=True), copies["router"],
              lambda x: load_router(x.parent, world.model), 0.5),
        entry("manifest of a corpus", damaged_json(manifest),
              copies["corpus"], lambda x: _open_corpus(x, world)),
        entry("packed rows", _cut((place / "corpus/parts" / _train_part(place)).read_bytes()),
              _corpus_part(place), lambda x: _open_corpus(x.parent, world), 0.5),
        entry("tokenizer.json", damaged_json(stored(place / "tokenizer.json")),
              place / "tokenizers/tokenizer.json", load_tokenizer, 0.5),
        *_run_entries(entry, place),
    ]  # fmt: skip


def _run_entries(entry: Callable[..., EntryPoint], place: Path) -> list[EntryPoint]:
    """Those of runs, and of texts."""
    runs = (STORED_SWEEP / "runs.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in runs[:6]]
    results = make_results(("sums",))
    pairs = [{"prompt": "+12,34=", "answer": "46"} for _ in range(3)]
    identity = {"train": to_dict(TRAINING), "data": "0" * 16}
    return [
        entry("results.json of a sweep", damaged_json(results), place / "sweep/results.json",
              _read_results),
        entry("results.json to compare", damaged_json(results), place / "sweep/results.json",
              lambda x: read_sweep(x.parent)),
        entry("runs.jsonl", damaged_lines(records), place / "records/runs.jsonl", _read_records),
        entry("metrics.jsonl", damaged_lines(METRICS), place / "metrics/metrics.jsonl",
              _read_metrics),
        entry("workdir of a training", damaged_json(identity), place / "training/config.json",
              _continue_training),
        entry("JSON lines of documents", damaged_lines([{"text": "abc"}] * 3), place / "d.jsonl",
              lambda x: [list(text) for _, text in read_documents(x)]),
        entry("JSON lines of a task", damaged_lines(pairs), place / "t.jsonl", _read_task),
    ]  # fmt: skip


def _load_training(path: Path) -> None:
    load_config(str(path), TrainConfig)


def _read_results(path: Path) -> None:
    found = load_results(path)
    if hasattr(found, "table"):
        assert isinstance(found.table, str)


def _read_records(path: Path) -> None:
    """An odd line is set aside with a message, which counts as refused."""
    (path.parent / "sweep.json").write_text("{}")
    records = Records(path.parent, {}, lambda x: check_record(x, 4), "sweep.json", lambda *x: x[1])
    with require_sound(path, ""):
        json.dumps(records.all)
    aside = path.with_suffix(".odd.jsonl")
    require(not aside.exists() or aside.unlink(), "a line is set aside")


def _read_metrics(path: Path) -> None:
    """An odd line is left out with a message, which counts as refused."""
    results = load_results(path)
    repr(results)
    require(len(results.rows) == len(METRICS), "a line is left out")


def _continue_training(path: Path) -> None:
    require_own(path.parent, TRAINING)
    require_same(path.parent, TRAINING, {"data": "0" * 16}, 12, step=0)


def _read_task(path: Path) -> None:
    data = TaskData(paths=(str(path),), prompt_length=16, answer_length=8)
    task = EvalTask(name="t", metric="exact_match", data=data)
    load_items(task, load_tokenizer(path.parent / "tokenizer.json"), MODEL)


def _open_corpus(path: Path, world: SimpleNamespace) -> None:
    folder = path.parent
    rows = load_corpus(replace(world.corpus, folder=str(folder)), 1, world.tokenizer)
    rows.rows(np.arange(rows.num_rows))


def _cut(whole: bytes) -> st.SearchStrategy[Case]:
    """The bytes of a file with some changed in its head, or the end missing, or more."""
    cut = st.integers(0, len(whole) - 1).map(lambda n: Case(whole[:n], True))
    more = st.binary(min_size=1, max_size=9).map(lambda x: Case(whole + x, True))
    flip = st.integers(0, len(whole) - 1).map(
        lambda n: Case(whole[:n] + bytes([whole[n] ^ 255]) + whole[n + 1 :], True)
    )
    return cut | more | flip


def _copied(place: Path, name: str) -> Path:
    """The file that describes a copy of a folder."""
    shutil.copytree(place / name, place / "copies" / name)
    return place / "copies" / name / (MANIFEST if name == "corpus" else "config.json")


def _corpus_part(place: Path) -> Path:
    shutil.copytree(place / "corpus", place / "rows")
    return place / "rows/parts" / _train_part(place)


def _train_part(place: Path) -> str:
    """The first file of the split that is read."""
    return stored(place / "corpus" / MANIFEST)["splits"]["train"]["parts"][0]["file"]


def _linked(source: Path, target: Path, name: str) -> Path:
    """A folder of links to another's files, all but the one that is replaced."""
    target.mkdir()
    for file in source.iterdir():
        if file.name != name:
            (target / file.name).symlink_to(file)
    return target / name
