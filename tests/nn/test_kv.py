"""Writing a few places of a canvas: every way to say which."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dials_jax.nn.kv import KV, Slots, write_slots

B, S = 3, 7


def numbered(*shape, start=1.0):
    return start + jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)


CANVAS = KV(numbered(B, S, 2, 4), -numbered(B, S, 2, 4))


def by_hand(new, index, active=None, keep=None):
    """The same with loops."""
    out = [np.array(x) for x in CANVAS]
    for row in range(B):
        for t in range(index.shape[1]):
            written = (active is None or active[row, t]) and (keep is None or keep[row])
            if written:
                for part, x in zip(out, new, strict=True):
                    part[row, index[row, t]] = x[row, t]
    return out


def new_of(num_rows, size):
    return KV(numbered(num_rows, size, 2, 4, start=1e3), numbered(num_rows, size, 2, 4, start=1e4))


def assert_same(actual, expected):
    for ours, wanted in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(ours, wanted)


@pytest.mark.parametrize("contiguous", [False, True])
def test_a_range_is_written_and_the_rest_stays(contiguous):
    index, new = jnp.broadcast_to(2 + jnp.arange(3), (B, 3)), new_of(B, 3)
    write_jit = jax.jit(write_slots, static_argnames="contiguous")
    out = write_jit(CANVAS, new, Slots(index), contiguous=contiguous)
    assert_same(out, by_hand(new, index))


SCATTERED = jnp.array([[6, 0, 3], [1, 2, 5], [4, 6, 0]])
ACTIVE = jnp.array([[True, False, True], [False] * 3, [True] * 3])


@pytest.mark.parametrize("active", [None, ACTIVE])
@pytest.mark.parametrize("keep", [None, jnp.array([True, True, False])])
@pytest.mark.parametrize("contiguous", [False, True])
def test_only_active_slots_of_kept_rows_are_written(active, keep, contiguous):
    index = jnp.broadcast_to(4 + jnp.arange(3), (B, 3)) if contiguous else SCATTERED
    new = new_of(B, 3)
    out = write_slots(CANVAS, new, Slots(index, active), contiguous=contiguous, keep=keep)
    assert_same(out, by_hand(new, index, active, keep=keep))


def test_a_canvas_may_be_any_tree_of_places():
    flat = {"confidence": numbered(B, S)}
    out = write_slots(flat, {"confidence": jnp.zeros((B, 3))}, Slots(SCATTERED))
    expected = np.array(flat["confidence"])
    np.put_along_axis(expected, np.asarray(SCATTERED), 0.0, axis=1)
    np.testing.assert_array_equal(out["confidence"], expected)
