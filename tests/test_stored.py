"""Arrays on disk come back bit for bit, or the reason is one line."""

import threading
import time
from concurrent import futures
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dials_jax import digests, stored
from dials_jax.errors import InputError
from dials_jax.stored import UnreadableTree, load_tree, require_new, save_tree

TREE = {"a": np.array([1.5, np.nan, -0.0], np.float32), "b": {"c": np.arange(6).reshape(2, 3)}}


@pytest.fixture
def tree():
    return jax.tree.map(jnp.asarray, TREE)


@pytest.fixture
def saved(tree, tmp_path):
    save_tree(tmp_path / "tree", tree, "make room")
    return tmp_path / "tree"


def test_a_tree_comes_back_bitwise_and_replaces_an_earlier_one(tree, saved):
    expected = digests.digest_hex(tree)
    back = load_tree(saved, tree, expected)
    assert jax.tree.map(lambda x: np.asarray(x).tobytes(), back) == jax.tree.map(
        lambda x: np.asarray(x).tobytes(), tree
    )
    other = jax.tree.map(lambda x: x + 1, tree)
    save_tree(saved, other, "make room", chunk_bytes=16)
    load_tree(saved, tree, digests.digest_hex(other))
    with pytest.raises(UnreadableTree, match="do not match their digests"):
        load_tree(saved, tree, expected)


def test_a_digest_of_the_callers_is_compared(tree, saved):
    load_tree(saved, tree, 2, digest=len)
    with pytest.raises(UnreadableTree, match="digests"):
        load_tree(saved, tree, 3, digest=len)


def test_other_trees_and_missing_ones_have_a_reason_of_one_line(tree, saved, tmp_path):
    for folder, like in ((tmp_path / "none", tree), (saved, {"z": tree["a"]})):
        with pytest.raises(UnreadableTree) as error:
            load_tree(folder, like, {})
        assert str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("error", [jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED"), MemoryError()])
def test_want_of_memory_is_passed_on(error, tree, saved, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(stored.ocp, "load", fail)
    monkeypatch.setattr(stored.ocp, "save", fail)
    with pytest.raises(type(error)):
        load_tree(saved, tree, {})
    with pytest.raises(type(error)):
        save_tree(saved, tree, "make room")


def test_what_cannot_be_written_ends_in_a_line_with_the_remedy(tree, tmp_path):
    (tmp_path / "file").touch()
    before = set(threading.enumerate())
    with pytest.raises(InputError, match=r"tree could not be written \(.*\); make room$") as error:
        save_tree(tmp_path / "file" / "tree", tree, "make room")
    assert "\n" not in str(error.value)
    # Python waits for threads at its end: Orbax's would be there for five minutes.
    assert not [x for x in set(threading.enumerate()) - before if not x.daemon]


def test_the_earlier_tree_is_gone_before_orbax_saves(tree, saved, monkeypatch):
    """Of several processes, Orbax lets one wait for ever where it has to remove a folder itself."""
    real = stored.ocp.save

    def save(folder, *args, **kwargs):
        assert not folder.exists() and not kwargs
        real(folder, *args)

    monkeypatch.setattr(stored.ocp, "save", save)
    save_tree(saved, tree, "make room")
    load_tree(saved, tree, digests.digest_hex(tree))


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "x", tmp_path / "file" / "y" / "x"):
        with pytest.raises(InputError, match=r"x cannot be made: .*file is no folder; name anoth"):
            require_new(path)


def test_orbax_does_one_thing_at_a_time(tmp_path):
    """A thread writes a checkpoint while a model is exported; Orbax mixes up the folders of two."""
    at_work, most = [], []

    def operation(name):
        function = getattr(stored.ocp, name)

        def counted(*args):
            at_work.append(name)
            most.append(len(at_work))
            time.sleep(0.01)
            found = function(*args)
            at_work.pop()
            return found

        return mock.patch.object(stored.ocp, name, counted)

    def work(name):
        tree = {name: jnp.arange(4.0)}
        save_tree(tmp_path / name, tree, "nothing is left")
        return load_tree(tmp_path / name, tree, digests.digest_hex(tree))

    with operation("save"), operation("load"), futures.ThreadPoolExecutor(4) as pool:
        assert [sorted(tree) for tree in pool.map(work, "abcd")] == [["a"], ["b"], ["c"], ["d"]]
    assert len(most) == 8 and set(most) == {1}
