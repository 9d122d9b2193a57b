"""A checkpoint comes back bit for bit, or an older one does."""

import errno
import logging
import resource
import shutil
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dials_jax import stored
from dials_jax.errors import InputError
from dials_jax.training import checkpoint, host_copy
from dials_jax.training.checkpoint import Checkpoints
from dials_jax.training.losses import Mean
from dials_jax.training.step import TrainState


def make_state(step):
    """Distinct bits for every step, with values that comparisons like to hide."""
    rng = np.random.default_rng(step)
    odd = jnp.array([jnp.nan, -0.0, jnp.inf, 1e-45, 1.5], jnp.float32)
    params = {
        "layers": {"q": jnp.asarray(rng.normal(size=(3, 40, 20)), jnp.float32), "odd": odd},
        "head": jnp.asarray(rng.normal(size=(7, 5)), jnp.bfloat16),
    }
    opt_state = (jnp.int32(step), {"mu": jax.tree.map(jnp.negative, params)}, jnp.array([True]))
    return TrainState(jnp.int32(step), params, opt_state, jnp.int32(-1))


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def save(checkpoints, step):
    checkpoints.save(step, make_state(step))
    checkpoints.wait()


def edit(path):
    path.write_text('{"steps": 5}')


def replace_by_a_folder(path):
    path.unlink()
    path.mkdir()


HARMS = {
    "changed": lambda path: path.write_text(path.read_text().replace("8", "9", 1)),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "a folder": replace_by_a_folder,
    "edited": edit,
}


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "checkpoints", keep=2)


@pytest.fixture(scope="module")
def two_saves(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    for step in (10, 20):
        save(Checkpoints(folder, keep=2), step)
    return folder


@pytest.fixture
def copied(two_saves, tmp_path):
    """Checkpoints 10 and 20, to damage."""
    shutil.copytree(two_saves, tmp_path / "checkpoints")
    return Checkpoints(tmp_path / "checkpoints", keep=2)


def test_a_state_comes_back_bitwise(copied):
    assert_same_bits(copied.restore(make_state(0)), make_state(20))


WINDOW = [{"loss": Mean(jnp.float32(0.1), jnp.float32(8))}, {"loss": Mean(1e-30, 3.0)}]


def test_metrics_that_no_line_is_of_come_back_bitwise(copied):
    assert copied.restore(make_state(0)) and copied.window == []
    copied.save(30, make_state(30), WINDOW)
    copied.wait()
    again = Checkpoints(copied.folder)
    again.require_own()
    assert_same_bits(again.restore(make_state(0)), make_state(30))
    assert again.window == [{"loss": (float(np.float32(0.1)), 8.0)}, {"loss": (1e-30, 3.0)}]


@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS)
def test_damaged_metrics_are_a_damaged_checkpoint(harm, copied, caplog):
    copied.save(30, make_state(30), WINDOW)
    copied.wait()
    harm(copied.folder / "00000030" / checkpoint.WINDOW)
    assert_same_bits(copied.restore(make_state(0)), make_state(20))
    assert copied.window == [] and "00000030 is damaged" in caplog.text


def test_without_checkpoints_there_is_nothing_to_restore(checkpoints):
    assert checkpoints.restore(make_state(0)) is None


def test_only_the_newest_are_kept(copied):
    save(copied, 30)
    assert copied.steps() == [20, 30]
    assert sorted(p.name for p in copied.folder.iterdir()) == ["00000020", "00000030"]


def test_nothing_is_removed_before_the_new_one_is_verified(copied, monkeypatch):
    def misread(folder, flat):
        return {name: x.at[(0,) * x.ndim].set(x.dtype.type(1)) for name, x in flat.items()}

    monkeypatch.setattr(stored, "_read", misread)
    with pytest.raises(OSError, match="reads back differently"):
        save(copied, 30)
    monkeypatch.undo()
    assert copied.steps() == [10, 20]
    assert_same_bits(copied.restore(make_state(0)), make_state(20))


# ---------------------------------------------------------------------------- beside training


@pytest.fixture
def slow(monkeypatch):
    """Saves wait for this event."""
    event, save_tree = threading.Event(), checkpoint.save_tree

    def save_later(*args, **kwargs):
        assert event.wait(60)
        save_tree(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save_tree", save_later)
    return event


@pytest.fixture
def full(monkeypatch):
    def fail(*args, **kwargs):
        raise InputError("the disk is full")

    monkeypatch.setattr(checkpoint, "save_tree", fail)


@pytest.mark.parametrize("pinned_bytes", [host_copy.PINNED_BYTES, 0], ids=["device", "host"])
def test_what_is_saved_is_the_state_of_that_moment(checkpoints, slow, monkeypatch, pinned_bytes):
    monkeypatch.setattr(host_copy, "PINNED_BYTES", pinned_bytes)  # who copies
    state = make_state(10)
    checkpoints.save(10, state)
    jax.jit(lambda tree: jax.tree.map(lambda x: x + x, tree), donate_argnums=0)(state)
    assert all(x.is_deleted() for x in jax.tree.leaves(state.params))
    checkpoints.wait(unless_at_work=True)
    assert checkpoints.steps() == []
    slow.set()
    checkpoints.wait()
    assert checkpoints.steps() == [10]
    assert_same_bits(checkpoints.restore(make_state(0)), make_state(10))


def test_the_end_of_a_run_waits_for_a_save(checkpoints, slow):
    with checkpoints:
        checkpoints.save(10, make_state(10))
        threading.Timer(0.1, slow.set).start()
    assert checkpoints.steps() == [10]


def test_without_a_device_of_the_host_a_save_waits(checkpoints, monkeypatch):
    monkeypatch.setattr(host_copy, "_host_device", lambda: None)
    checkpoints.save(10, make_state(10))
    assert_same_bits(checkpoints.restore(make_state(0)), make_state(10))


def test_an_error_of_a_save_is_raised_once_by_what_comes_next(checkpoints, full):
    def end_of_run():
        with checkpoints:
            pass

    for comes_next in (checkpoints.wait, lambda: checkpoints.save(20, make_state(20)), end_of_run):
        checkpoints.save(10, make_state(10))
        with pytest.raises(InputError, match="the disk is full"):
            comes_next()
        checkpoints.wait()


def test_an_error_of_a_save_does_not_hide_what_ended_the_run(checkpoints, full, caplog):
    with pytest.raises(KeyError, match="why"), checkpoints:
        checkpoints.save(10, make_state(10))
        raise KeyError("why")
    assert "the disk is full" in caplog.text


# ------------------------------------------------------------------------------------ damage


def largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(folder):
    file = largest_file(folder)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_a_bit(folder):
    file = largest_file(folder)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def lose_the_digests(folder):
    (folder / "digest.json").unlink()


def cut_the_digests(folder):
    (folder / "digest.json").write_text('{"0.la')


def lose_the_arrays(folder):
    shutil.rmtree(folder / "state")


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGE = [truncate, flip_a_bit, lose_the_digests, cut_the_digests, lose_the_arrays, empty]
UNFINISHED = [lose_the_digests, empty]  # what a save that was stopped may look like: no warning


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_falls_back_to_the_older_checkpoint(damage, copied, caplog):
    damage(copied.folder / "00000020")
    with caplog.at_level(logging.WARNING):
        assert_same_bits(copied.restore(make_state(0)), make_state(10))
    warned = [r for r in caplog.records if r.name == checkpoint.__name__]
    assert len(warned) == (0 if damage in UNFINISHED else 1)
    assert all("00000020 is damaged" in r.getMessage() for r in warned)


@pytest.mark.parametrize("step", [30, 25])  # 25: by a run with another save_every
def test_what_a_stopped_save_leaves_is_ignored_and_removed(step, copied):
    partial = copied.folder / f"{step:08d}.partial"
    shutil.copytree(copied.folder / "00000020", partial)
    assert copied.steps() == [10, 20]
    assert_same_bits(copied.restore(make_state(0)), make_state(20))
    save(copied, 30)
    assert not partial.exists()
    assert_same_bits(copied.restore(make_state(0)), make_state(30))


def test_none_intact_is_an_error(copied):
    for step in (10, 20):
        flip_a_bit(copied.folder / f"{step:08d}")
    with pytest.raises(InputError, match=r"no checkpoint in .* is intact; bring back a copy"):
        copied.restore(make_state(0))


@pytest.mark.parametrize("error", [jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED"), MemoryError()])
def test_want_of_memory_is_no_damage(error, copied, monkeypatch):
    def fail(*args):
        raise error

    monkeypatch.setattr(stored, "_read", fail)
    with pytest.raises(type(error)):
        copied.restore(make_state(0))
    assert copied.steps() == [10, 20]


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(copied):
    flip_a_bit(copied.folder / "00000020")
    save(copied, 20)
    assert_same_bits(copied.restore(make_state(0)), make_state(20))


def test_what_was_found_damaged_never_displaces_an_intact_one(copied):
    """Nor is it removed: who knows what was wrong. Training goes on before it."""
    flip_a_bit(copied.folder / "00000020")
    checkpoints = Checkpoints(copied.folder, keep=1)
    assert_same_bits(checkpoints.restore(make_state(0)), make_state(10))
    save(checkpoints, 15)
    assert checkpoints.steps() == [15, 20]
    assert_same_bits(checkpoints.restore(make_state(0)), make_state(15))
    save(checkpoints, 25)
    assert checkpoints.steps() == [25]


def test_one_that_was_found_damaged_is_not_one_of_those_kept(copied):
    flip_a_bit(copied.folder / "00000020")
    checkpoints = Checkpoints(copied.folder, keep=2)
    assert_same_bits(checkpoints.restore(make_state(0)), make_state(10))
    save(checkpoints, 25)
    assert checkpoints.steps() == [10, 20, 25]


# ------------------------------------------------------------------- unreadable, foreign, no room


@pytest.mark.parametrize("part", ["state", "digest.json"])
def test_what_cannot_be_read_is_not_damaged(part, copied, monkeypatch):
    """The newer checkpoint may be good: nothing goes back before it, nothing is removed."""
    opened = Path.open

    def refuse(self, *args, **kwargs):
        if "00000020" in str(self) and part in str(self):
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return opened(self, *args, **kwargs)

    def fail(folder, flat):
        raise ValueError("Orbax says something")

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(stored, "_read", fail)
    message = "00000020.* cannot be read .Permission denied.; nothing was changed"
    with pytest.raises(InputError, match=message):
        copied.restore(make_state(0))
    monkeypatch.undo()
    assert_same_bits(copied.restore(make_state(0)), make_state(20))


def test_a_folder_that_hides_its_checkpoints_is_not_an_empty_one(copied, monkeypatch):
    def refuse(self):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(InputError, match="checkpoints cannot be read"):
        copied.restore(make_state(0))


@pytest.mark.parametrize("name", ["00000030", "00000030.partial"])
def test_folders_that_no_save_made_are_refused_and_kept(name, copied):
    foreign = copied.folder / name
    foreign.mkdir()
    copied.require_own()  # an empty one holds nothing
    (foreign / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match=f"{name} is no checkpoint .*move it away"):
        copied.require_own()
    save(copied, 40)
    assert (foreign / "thesis.txt").exists()


def test_a_full_disk_ends_in_a_line_and_the_older_ones_stay(copied):
    """A limit on the size of files stands for it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(InputError, match="older checkpoints stay; make room") as error:
            save(copied, 30)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    assert sorted(p.name for p in copied.folder.iterdir()) == ["00000010", "00000020"]
    assert_same_bits(copied.restore(make_state(0)), make_state(20))
