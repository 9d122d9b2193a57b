"""A workdir's copy in a bucket continues the run wherever the first machine was lost.

The buckets are those of real servers on this machine, for gs:// and for s3://.
"""

import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

import fsspec
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
from tests.conftest import small_config

SERVERS = {
    "gs": ("gcp_storage_emulator", "start", "--in-memory", "--host", "localhost", "--port"),
    "s3": ("moto.server", "--port"),
}


@pytest.fixture(scope="module")
def servers():
    """Both kinds of buckets, one called "things" in each, and where they are in the environment."""
    ports, processes = {}, []
    try:
        for scheme, command in SERVERS.items():
            with socket.socket() as found:
                found.bind(("localhost", 0))
                ports[scheme] = str(found.getsockname()[1])
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", *command, ports[scheme]],
                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                )
            )  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asks Google's own servers
            patch.setenv("NO_GCE_CHECK", "true")  # nor the machine's
            patch.setenv("STORAGE_EMULATOR_HOST", f"http://localhost:{ports['gs']}")
            patch.setenv("AWS_ENDPOINT_URL", f"http://localhost:{ports['s3']}")
            for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
                patch.setenv(name, "none")
            patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
            for scheme, port in ports.items():
                wait_for(int(port))
                fsspec.filesystem(scheme).mkdir("things")
            yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def wait_for(port):
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            return socket.create_connection(("localhost", port), 1).close()
        except OSError:
            time.sleep(0.05)
    raise AssertionError(f"no server listens at {port}")


@pytest.fixture
def place(servers, tmp_path):
    """An address of its own for each test: in which of the two makes no difference to `Mirror`."""
    return f"gs://things/{tmp_path.name}"


# --------------------------------------------------------------------------- lost at any moment


class FakeRun:
    """What a training leaves, without its arrays; it keeps one checkpoint."""

    def __init__(self, folder):
        self.folder, self.step, self.sent = folder, 0, 0
        folder.mkdir()
        (folder / EXPERIMENT).write_text("{}")

    def take_step(self):
        self.step += 1
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": self.step}) + "\n")
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
        for name in ("state/a", "digest.json", "state/b"):  # of the one before, in any order
            (final.with_name(f"{self.step - 1:08d}") / name).unlink(missing_ok=True)


def newest_whole(folder):
    """The newest step whose arrays are there, as their digests say; 0: none."""
    whole = [0]
    for seal in folder.glob("checkpoints/*/digest.json"):
        arrays = {
            x.name: hashlib.sha256(x.read_bytes()).hexdigest() for x in seal.parent.rglob("?")
        }
        if arrays == json.loads(seal.read_text()):
            whole.append(int(seal.parent.name))
    return max(whole)


def test_the_copy_is_whole_whenever_the_machine_is_lost(place, tmp_path, monkeypatch):
    """After every object that is written or removed it holds a step, and never an older one.

    The run goes on meanwhile, also between two folders that are looked at.
    """
    rng, run = random.Random(0), FakeRun(tmp_path / "run")
    walk, newest, looks = os.walk, 0, 0

    def walk_while_it_works(folder):
        for found in walk(folder):
            if str(folder) == str(run.folder) and run.step < 12 and rng.random() < 0.1:
                run.take_step()
            yield found

    monkeypatch.setattr(mirror.os, "walk", walk_while_it_works)
    first = Mirror(run.folder, place)

    def look(action):
        def acted(*arguments):
            nonlocal newest, looks
            action(*arguments)
            if mirror.PROBE in arguments:
                return
            looks += 1
            other = tmp_path / f"other{looks}"
            other.mkdir()
            second = Mirror(other, place)
            second._over.set()
            found = newest_whole(other)
            assert found >= newest
            newest = found
            lines = (other / "metrics.jsonl").read_text() if found else ""
            assert lines.count("\n") >= found
            if sum(1 for _ in walk(other)) > 1:
                assert (other / EXPERIMENT).exists()  # or the run would be refused

        return acted

    for name in ("write", "remove"):
        monkeypatch.setattr(first.bucket, name, look(getattr(first.bucket, name)))
    for _ in range(7):
        run.take_step()
        first.push()
    first.finish()
    assert newest == run.step > 8 and looks > 20
    held = {x for x in first.bucket.sizes() if not x.startswith(mirror.OWN)}
    assert held == set(first._files())


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

    def note_the_step(self, workdir, step):
        begun.append(step)
        begin(self, workdir, step)

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
    FakeRun(folder).take_step()
    return folder


def test_one_workdir_writes_and_the_one_before_is_told(place, tmp_path):
    with mirrored(made_run(tmp_path / "a"), place):
        pass
    with mirrored(tmp_path / "a", place):  # it goes on
        pass
    first = Mirror(tmp_path / "a", place)
    with mirrored(tmp_path / "b", place) as folder:
        assert newest_whole(folder) == 1
        with pytest.raises(InputError, match="is in use by"), mirrored(folder, place):
            pass
        first.push()  # nothing was written by the second one yet
        (folder / "more").touch()
    with pytest.raises(InputError, match=r"is written by process .* in .*/b now, so nothing more"):
        first.finish()
    with (
        pytest.raises(InputError, match=r"was written by .*/b after .*/a; name a new --workdir"),
        mirrored(tmp_path / "a", place),
    ):
        pass
    with (
        pytest.raises(InputError, match="holds files, and not those of"),
        mirrored(made_run(tmp_path / "c"), place),
    ):
        pass


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
    assert not (tmp_path / "outside").exists() and not (tmp_path / "copy").exists()


def test_what_failed_is_copied_at_the_next_turn_or_said_at_the_end(place, tmp_path, monkeypatch):
    first = Mirror(made_run(tmp_path / "a"), place)
    with monkeypatch.context() as patch:
        patch.setattr(first.bucket._files, "pipe_file", lambda *_: 1 / 0)
        with pytest.raises(Unreachable, match="ZeroDivisionError"):
            first.push()
        with pytest.raises(InputError, match="is not copied to its end"):
            first.finish()
    first.push()
    assert first.bucket.read("metrics.jsonl") == (tmp_path / "a/metrics.jsonl").read_bytes()


def test_both_kinds_of_buckets_carry_a_folder_there_and_back(servers, tmp_path):
    source = made_run(tmp_path / "run")
    (source / "large").write_bytes(b"x" * 1000)
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
