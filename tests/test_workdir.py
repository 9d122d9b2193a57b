"""A folder serves one process at a time, and a run writes over nothing that it did not make."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dials_jax.errors import InputError
from dials_jax.files import local_path
from dials_jax.workdir import LOCK, differences, exclusive, read_mark, require_unclaimed

HOLDER = """
import sys, time
from dials_jax.workdir import exclusive
with exclusive(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_holder_is_refused_and_told_who_is_first(tmp_path):
    with exclusive(tmp_path / "run") as workdir:
        assert workdir == tmp_path / "run"
        with pytest.raises(InputError) as error, exclusive(tmp_path / "run"):
            pass
        assert str(error.value).startswith(f"{workdir} is in use by process {os.getpid()} on ")
        assert str(error.value).endswith("choose another --workdir")
        (workdir / "kept").touch()
    with exclusive(tmp_path / "run"):  # free again
        pass
    assert [path.name for path in workdir.iterdir()] == ["kept"]


def test_the_lock_dies_with_its_process(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=f"process {process.pid} on"), exclusive(tmp_path):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (tmp_path / LOCK).exists()
    with exclusive(tmp_path):
        pass


def test_a_folder_that_stays_empty_is_not_left_behind(tmp_path):
    with pytest.raises(InputError, match="wrong"), exclusive(tmp_path / "a" / "b"):
        raise InputError("wrong")
    assert list(tmp_path.iterdir()) == []


def test_a_lock_on_a_file_that_was_removed_does_not_count(tmp_path, monkeypatch):
    """The first holder ends, and removes its file, between the second's opening and locking."""
    first = exclusive(tmp_path)
    first.__enter__()
    opened = os.open

    def open_then_end(path, *args):
        descriptor = opened(path, *args)
        if str(path).endswith(LOCK):
            monkeypatch.undo()
            first.__exit__(None, None, None)
        return descriptor

    monkeypatch.setattr(os, "open", open_then_end)
    with exclusive(tmp_path), pytest.raises(InputError, match="in use"), exclusive(tmp_path):
        pass


def test_a_file_or_a_place_that_takes_no_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(InputError, match=r"file is no folder that can be .* another --workdir"):
            exclusive(path).__enter__()


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("", "is empty"),
        ("gs://bucket/run", "is no local path"),
        (Path("gs://bucket/run"), "is no local path"),
        ("s3+x://bucket", "is no local path"),
        ("~nobody_of_this_name/run", "is no path"),
        ("x" * 300, "File name too long"),
        ("run/" + "x" * 300 + "/deeper", "too long"),
        ("nul\0", "null byte"),
        ("not\udcff", "is no path"),
    ],
)
def test_what_is_no_local_path_is_refused_in_a_line(path, problem):
    with pytest.raises(InputError, match=problem) as error:
        local_path(path, "--workdir")
    assert str(error.value).startswith("--workdir") and "\n" not in str(error.value)
    str(error.value).encode()


def test_a_home_is_found_and_other_names_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_path("~/run", "--workdir") == tmp_path / "run"
    assert local_path("C:/run", "--workdir") == Path.cwd() / "C:/run"
    assert local_path(tmp_path / "a: b", "--workdir") == tmp_path / "a: b"


def test_names_that_are_taken_belong_to_whoever_has_the_mark(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(InputError, match=r"model was not made by .* no config\.json"):
        require_unclaimed(tmp_path, "config.json", ("checkpoints", "model"))
    require_unclaimed(tmp_path, "config.json", ("checkpoints",))
    (tmp_path / "config.json").touch()
    require_unclaimed(tmp_path, "config.json", ("checkpoints", "model"))


def test_only_paths_are_compared_as_paths():
    assert not differences({"scorer": "runs/a"}, {"scorer": os.path.abspath("runs/a")})
    assert differences({"extract": "(.*)/"}, {"extract": "(.*)"}) == {"extract": ("(.*)/", "(.*)")}


def test_weights_known_by_a_shorter_fingerprint_are_the_same_with_a_warning(caplog):
    now = "0123456789abcdef" + "fedcba9876543210"
    old, new = ({"weights": {"models": {"H": x}}} for x in (now[:16], now))
    assert not differences(old, new) and len(caplog.records) == 1
    other = {"weights": {"models": {"H": now[1:17]}}}
    assert list(differences(other, new)) == ["weights.models.H"]


def test_differences_have_both_values_and_lists_are_compared_whole():
    old = {"a": {"b": 1, "c": [1, 2]}, "d": [{"e": 1, "f": 2}], "same": None}
    new = {"a": {"b": 2, "c": [1, 3]}, "d": [{"e": 1, "f": 3}], "g": [1]}
    assert differences(old, new) == {
        "a.b": (1, 2),
        "a.c": ([1, 2], [1, 3]),
        "d.f": (2, 3),
        "g": (None, [1]),
    }
    assert differences([1], [1, 2], "x") == {"x": ([1], [1, 2])}


def test_a_mark_that_is_broken_is_named_with_the_remedy(tmp_path):
    assert read_mark(tmp_path / "study.json") is None
    (tmp_path / "study.json").write_text("[1]")
    with pytest.raises(InputError, match=r"study.json does not hold .*; put it back, or choose"):
        read_mark(tmp_path / "study.json")
