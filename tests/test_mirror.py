"""A workdir's copy in a bucket continues the run wherever the first machine was lost.

The buckets are those of real servers on this machine, for gs:// and for s3://.
"""

import errno
import hashlib
import json
import os
import random
import shutil
import signal

import pytest

from dials_jax import buckets, errors, mirror
from dials_jax.buckets import Bucket, Unreachable, check_address
from dials_jax.cli import main as cli
from dials_jax.config import ArithmeticData, ObjectiveConfig, OptimizerConfig, TrainConfig
from dials_jax.errors import InputError
from dials_jax.evaluation.harness_run import HARNESS_MARK
from dials_jax.evaluation.sweep_identity import SWEEP_FILE
from dials_jax.files import read_json
from dials_jax.mirror import Mirror, mirrored
from dials_jax.stopping import Stopped
from dials_jax.studies.study_records import STUDY
from dials_jax.training.loop import train
from dials_jax.training.metrics import MetricsWriter
from dials_jax.training.run import EXPERIMENT
from tests.bucket_servers import SERVERS, bucket_servers
from tests.conftest import small_config


@pytest.fixture(scope="module")
def servers():
    with bucket_servers():
        yield


@pytest.fixture
def place(servers, tmp_path):
    """An address of its own for each test: in which of the two makes no difference to `Mirror`."""
    return f"gs://things/{tmp_path.name}"


# --------------------------------------------------------------------------- lost at any moment


KEPT, EXPORTED = (3, 7), (2, 5)  # steps after which the model is kept, and replaced


class FakeRun:
    """What a training leaves, without its arrays; it keeps one checkpoint, and some models."""

    def __init__(self, folder):
        self.folder, self.step, self.sent = folder, 0, 0
        folder.mkdir()
        (folder / EXPERIMENT).write_text("{}")

    def take_step(self):
        self.step += 1
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": self.step}) + "\n")
        if self.step in KEPT:
            kept = self.folder / "steps" / f"{self.step:08d}" / "model"
            kept.mkdir(parents=True)
            for name in ("params", "config.json"):
                (kept / name).touch()
        final = self.folder / "checkpoints" / f"{self.step:08d}"
        partial = final.with_suffix(".partial")
        (partial / "state").mkdir(parents=True)
        digests = {}
        for name in ("a", "b"):
            content = f"{name} of {self.step}".encode()
            (partial / "state" / name).write_bytes(content)
            digests[name] = hashlib.sha256(content).hexdigest()
        (partial / "digest.json").write_text(json.dumps(digests))
        partial.rename(final)
        before = final.with_name(f"{self.step - 1:08d}")
        if before.exists():  # removed as `Checkpoints` does
            (before / "digest.json").unlink()
            shutil.rmtree(before)
        if self.step in EXPORTED:
            shutil.rmtree(self.folder / "model", ignore_errors=True)
            (self.folder / "model").mkdir()
            for name in ("params", "config.json"):
                (self.folder / "model" / name).write_text(str(self.step))


class Memory:
    """What `Bucket` does, in memory; `look` is called after every change."""

    address = "gs://in/memory"

    def __init__(self, look):
        self.held, self.look = {}, look

    def sizes(self):
        return {name: len(content) for name, content in self.held.items()}

    def read(self, name):
        return self.held.get(name)

    def write(self, name, content):
        self.held[name] = content
        self.look()

    def upload(self, name, file):
        self.write(name, file.read_bytes())

    def download(self, name, file, size):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(self.held[name])

    def remove(self, name):
        del self.held[name]
        self.look()


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def newest_whole(held):
    """The newest step whose arrays are there, as their digests say; 0: none."""
    whole = [0]
    for seal in held:
        if seal.startswith("checkpoints/") and seal.endswith("/digest.json"):
            state = seal.replace("digest.json", "state/")
            arrays = {
                name.removeprefix(state): hashlib.sha256(content).hexdigest()
                for name, content in held.items()
                if name.startswith(state)
            }
            if arrays == json.loads(held[seal]):
                whole.append(int(seal.split("/")[1]))
    return max(whole)


@pytest.mark.parametrize("seed", range(20))
def test_the_copy_is_whole_whenever_the_machine_is_lost(seed, tmp_path, monkeypatch):
    """After every object that is written or removed it holds a step, and never an older one.

    The run goes on meanwhile, also before and after each folder that is looked at.
    """
    rng, run, walk, newest = random.Random(seed), FakeRun(tmp_path / "run"), os.walk, 0
    busy = rng.choice((0.01, 0.03, 0.1))

    def walk_while_it_works(folder, **options):
        found = walk(folder, **options)
        while True:
            for _ in range(2):
                if rng.random() < busy:
                    run.take_step()
            try:
                yield next(found)
            except StopIteration:
                return

    def look():
        nonlocal newest
        held = bucket.held
        found, newest = newest_whole(held), max(newest, newest_whole(held))
        assert found == newest
        assert held.get("metrics.jsonl", b"").count(b"\n") >= found
        assert EXPERIMENT in held or not set(held) - {mirror.WRITER, mirror.PROBE}
        model = {held.get(f"model/{name}") for name in ("params", "config.json")}
        assert len(model) == 1 or "model/config.json" not in held
        for kept in KEPT:
            model = f"steps/{kept:08d}/model"
            assert f"{model}/params" in held or f"{model}/config.json" not in held
            assert f"{model}/config.json" in held or found < kept

    bucket = Memory(look)
    monkeypatch.setattr(mirror.os, "walk", walk_while_it_works)
    monkeypatch.setattr(mirror, "Bucket", lambda address, name: bucket)
    first = Mirror(run.folder, bucket.address)
    for turn in range(12):  # in every other one nothing is new, until it is looked at
        if turn % 2:
            run.take_step()
        first.push()
        if turn in (3, 7):
            other = tmp_path / f"other{turn}"
            other.mkdir()
            Mirror(other, bucket.address)
            assert newest_whole(contents(other)) == newest
            for model in other.glob("steps/*/model"):  # one without would be refused
                assert (model / "config.json").exists()
    monkeypatch.setattr(mirror.os, "walk", walk)
    first.push()
    assert newest == run.step
    assert set(bucket.held) == {*first._files(), mirror.WRITER}


def test_a_training_goes_on_on_another_machine(servers, tmp_path, monkeypatch):
    """SIGTERM, then the machine is lost: the copy ends bitwise as if nothing had happened."""
    model = small_config(num_layers=2, vocab_size=19, mask_id=18, eos_id=1, pad_id=0)
    cfg = TrainConfig(
        model=model, data=ArithmeticData(num_items=40), objective=ObjectiveConfig(kind="mdlm"),
        optimizer=OptimizerConfig(learning_rate=1e-2, num_steps=6, warmup_steps=1),
        batch_size=4, save_every=2, log_every=1,
    )  # fmt: skip
    address, write = "s3://things/training/run", MetricsWriter.write

    def write_and_stop(self, step, values):
        write(self, step, values)
        if step == 3:  # it is obeyed at the end of the next one
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsWriter, "write", write_and_stop)
        with pytest.raises(Stopped, match="step 4 is saved"), mirrored(tmp_path / "a", address):
            train(cfg, tmp_path / "a")
    begun, begin = [], MetricsWriter.__init__

    def note_the_step(self, workdir, step, *others):
        begun.append(step)
        begin(self, workdir, step, *others)

    monkeypatch.setattr(MetricsWriter, "__init__", note_the_step)
    with mirrored(tmp_path / "b", address):
        train(cfg, tmp_path / "b")
    train(cfg, tmp_path / "c")
    assert begun == [4, 0]
    digests = [read_json(tmp_path / x / "checkpoints/00000006/digest.json") for x in "bc"]
    assert digests[0] == digests[1]
    assert read_json(tmp_path / "b/model/config.json") == read_json(
        tmp_path / "c/model/config.json"
    )
    assert (tmp_path / "b/metrics.jsonl").read_bytes().count(b"\n") == 6
    cli.start("copy", f"{address}/model", str(tmp_path / "model"))
    same = [x.relative_to(tmp_path / "b/model") for x in (tmp_path / "b/model").rglob("*")]
    assert {x.relative_to(tmp_path / "model") for x in (tmp_path / "model").rglob("*")} == set(same)


# ----------------------------------------------------------------------------------- refused


def made_run(folder):
    if not folder.exists():
        FakeRun(folder).take_step()
    return folder


def test_one_workdir_writes_and_the_one_before_is_told(place, tmp_path):
    for _ in range(2):  # the second time it goes on
        with mirrored(made_run(tmp_path / "a"), place):
            pass
    first = Mirror(tmp_path / "a", place)
    first.start()
    with mirrored(tmp_path / "b", place) as folder:
        assert newest_whole(contents(folder)) == 1
        with pytest.raises(InputError, match="is in use by"), mirrored(folder, place):
            pass
        (tmp_path / "a" / "late").touch()
        first.push()  # nothing was written by the second one yet
        (tmp_path / "a" / "late").unlink()
        first.push()
        (folder / "more").touch()
    (tmp_path / "a" / "late").touch()
    taken = r"holds what .*/b on .* wrote, so nothing of .*/a is copied there; name a new --workdir"
    with pytest.raises(InputError, match=f"{taken}.*; .*/a is not copied to its end"):
        first.finish()
    for name in ("a", "c"):
        with (
            pytest.raises(InputError, match=taken.replace("/a", f"/{name}")),
            mirrored(made_run(tmp_path / name), place),
        ):
            pass
    assert "late" not in first.bucket.sizes()


def test_what_was_fetched_is_not_written_over_what_came_later(place, tmp_path):
    """A second one was lost before it wrote; the first went on, and the second comes again."""
    for name in ("a", "b"):
        with mirrored(tmp_path / name if name == "b" else made_run(tmp_path / name), place):
            pass
    with mirrored(tmp_path / "a", place) as folder:
        (folder / "metrics.jsonl").write_text("of later steps")
    (tmp_path / "b" / "metrics.jsonl").write_text("of others")
    with (
        pytest.raises(InputError, match=r"holds what .*/a on .* wrote, so nothing of .*/b"),
        mirrored(tmp_path / "b", place),
    ):
        pass


def test_a_copy_that_was_removed_is_not_continued_half(place, tmp_path):
    first = Mirror(made_run(tmp_path / "a"), place)
    first.push()
    for name in first.bucket.sizes():
        first.bucket.remove(name)
    (tmp_path / "a" / "more").touch()
    with pytest.raises(InputError, match="holds what something else wrote"):
        first.push()
    assert not first.bucket.sizes()
    Mirror(tmp_path / "a", place).push()  # the same command again
    assert first.bucket.sizes().keys() == {*first._files(), mirror.WRITER}


def test_a_model_that_is_removed_while_it_is_copied_does_not_count(place, tmp_path, monkeypatch):
    folder = made_run(tmp_path / "a")
    (folder / "model").mkdir()
    for name in ("params", "config.json"):
        (folder / "model" / name).touch()
    first = Mirror(folder, place)
    upload = first.bucket.upload

    def upload_and_lose(name, file):
        (folder / "model" / "params").unlink(missing_ok=True)
        upload(name, file)

    monkeypatch.setattr(first.bucket, "upload", upload_and_lose)
    assert first.push() == ["model/config.json"]
    assert not any(name.startswith("model/") for name in first.bucket.sizes())


def test_what_cannot_be_seen_is_not_removed_from_the_copy(place, tmp_path, monkeypatch):
    first = Mirror(made_run(tmp_path / "a"), place)
    first.push()
    held = first.bucket.sizes()

    def fail(folder):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(folder))

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", fail)
        with pytest.raises(OSError, match="Stale"):
            first.push()
    (tmp_path / "a" / EXPERIMENT).unlink()
    with pytest.raises(InputError, match=r"has lost its \['config.json'\]"):
        first.push()
    (tmp_path / "a" / "checkpoints").rename(tmp_path / "elsewhere")
    (tmp_path / "a" / "checkpoints").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="/a/checkpoints is a link"):
        first.push()
    assert first.bucket.sizes() == held


def test_a_folder_or_a_bucket_of_others_is_left_alone(place, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").touch()
    with pytest.raises(InputError, match="no run's"), mirrored(tmp_path / "home", place):
        pass
    bucket = Bucket(place, "DST")
    assert not bucket.sizes()
    bucket.write("letter.txt", b"x")
    with pytest.raises(InputError, match="no run's"), mirrored(tmp_path / "new", place):
        pass
    assert bucket.sizes() == {"letter.txt": 1} and not (tmp_path / "new" / "letter.txt").exists()
    with (
        pytest.raises(Unreachable, match="no-such-bucket/run cannot be used"),
        mirrored(tmp_path / "new", "gs://no-such-bucket/run"),
    ):
        pass
    with pytest.raises(InputError, match=r"DST=.* holds files"):
        cli.start("copy", str(tmp_path / "home"), place)
    Bucket("s3://things/names", "DST").write("../outside", b"x")  # the other server knows no such
    with pytest.raises(InputError, match="which is no file's"):
        cli.start("copy", "s3://things/names", str(tmp_path / "copy"))
    with pytest.raises(InputError, match="az://things/x is no local path"):
        cli.start("copy", "az://things/x", "gs://things/y")
    assert not (tmp_path / "outside").exists() and not (tmp_path / "copy").exists()


def test_what_failed_is_copied_at_the_next_turn_or_said_at_the_end(place, tmp_path, monkeypatch):
    first = Mirror(made_run(tmp_path / "a"), place)
    first.start()
    with monkeypatch.context() as patch:
        patch.setattr(first.bucket._files, "pipe_file", lambda *_, **__: 1 / 0)
        with pytest.raises(Unreachable, match="ZeroDivisionError"):
            first.push()
        with pytest.raises(InputError, match="is not copied to its end"):
            first.finish()
    first.push()
    assert first.bucket.read("metrics.jsonl") == (tmp_path / "a/metrics.jsonl").read_bytes()


def test_a_signal_during_the_last_copy_ends_the_run_after_it(place, tmp_path, monkeypatch):
    push, run = Mirror.push, made_run(tmp_path / "a")

    def push_at_a_signal(self):
        signal.raise_signal(signal.SIGINT)
        return push(self)

    monkeypatch.setattr(Mirror, "push", push_at_a_signal)
    with pytest.raises(Stopped, match=f"a is copied to {place}$") as stop, mirrored(run, place):
        pass
    assert stop.value.status == 128 + signal.SIGINT
    with pytest.raises(ValueError, match="why it ends"), mirrored(run, place):
        (run / "more").touch()
        raise ValueError("why it ends")
    assert Bucket(place, "--mirror").sizes().keys() == {"more", mirror.WRITER, *contents(run)} - {
        mirror.MIRROR_STATE
    }


def test_both_kinds_of_buckets_carry_a_folder_there_and_back(servers, tmp_path):
    source = made_run(tmp_path / "run")
    (source / "large").write_bytes(b"x" * 1000)
    for i, content in enumerate((b"", b"\r", b"a\r", b"a\r\n", b"a\n--==0==\nb", b"--==0==--\r")):
        (source / f"{i}.bin").write_bytes(content)  # as bytes of arrays may be
    for scheme in SERVERS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(buckets, "AT_ONCE", 500)  # larger ones go in parts
            cli.start("copy", str(source), f"{scheme}://things/copied")
        cli.start("copy", f"{scheme}://things/copied", str(tmp_path / scheme))
        for file in source.rglob("*"):
            other = tmp_path / scheme / file.relative_to(source)
            assert other.is_dir() if file.is_dir() else other.read_bytes() == file.read_bytes()
        cli.start("copy", f"{scheme}://things/copied/large", str(tmp_path / f"{scheme}.txt"))
        assert (tmp_path / f"{scheme}.txt").stat().st_size == 1000


def test_an_address_is_checked_and_shows_no_secret(monkeypatch):
    for wrong in ("http://x/y", "gs://bucket", "gs://", "runs/x", "s3://key:secret@bucket/run"):
        with pytest.raises(InputError, match=r"--mirror=.* is no address; give one as") as error:
            check_address(wrong, "--mirror")
        assert "secret" not in str(error.value)
    assert check_address("gs://bucket/a/run//", "--mirror") == "gs://bucket/a/run"
    monkeypatch.setattr(errors, "find_spec", lambda name: None)
    for scheme, extra in (("gs", "gcs"), ("s3", "s3")):
        with pytest.raises(InputError, match=rf"missing; pip install 'dials_jax\[{extra}\]'"):
            check_address(f"{scheme}://bucket/run", "--mirror")
    with pytest.raises(InputError, match="missing"):
        cli.start("train", "--config", "demo/model", "--workdir", "x", "--mirror", "gs://b/run")


def test_the_marks_are_those_of_all_runs():
    assert set(mirror.MARKS) == {EXPERIMENT, SWEEP_FILE, STUDY, HARNESS_MARK}
