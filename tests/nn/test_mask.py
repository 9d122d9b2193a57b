"""A mask against its definition key by key, and what attention makes of each member."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from dials_jax.nn.attention import attend
from dials_jax.nn.kernels.dispatch import ATTENTION
from dials_jax.nn.kv import KV
from dials_jax.nn.mask import Mask

NUM_QUERIES, NUM_KEYS = 3, 8
MEMBERS = {
    "valid": np.arange(NUM_KEYS) >= np.array([[0], [2]]),
    "causal": True,
    "block_length": 3,
    "positions": np.array([[2, 5, 7], [4, 3, 6]]),
    "written": np.array([8, 5]),
}
SUBSETS = [
    names for n in range(len(MEMBERS) + 1) for names in itertools.combinations(MEMBERS, n)
]  # fmt: skip


def sees(members, sequence, query, key):
    position = members["positions"][sequence, query] if "positions" in members else query
    length = members.get("block_length", 1)
    first = np.argmax(members["valid"][sequence]) if "valid" in members else 0  # of the blocks
    own_block = (position - first) // length
    return (
        ("valid" not in members or members["valid"][sequence, key])
        and ("causal" not in members or key <= position)
        and ("block_length" not in members or (key - first) // length <= own_block)
        and ("written" not in members or key < members["written"][sequence])
    )


def reference(members):
    seen = np.zeros((2, 1, NUM_QUERIES, NUM_KEYS), bool)
    for (b, _, t, s), _ in np.ndenumerate(seen):
        seen[b, 0, t, s] = sees(members, b, t, s)
    return seen


def chosen(names):
    members = {name: MEMBERS[name] for name in names}
    return members, Mask(**{n: jnp.asarray(x) if np.ndim(x) else x for n, x in members.items()})


@pytest.mark.parametrize("names", SUBSETS, ids="-".join)
def test_a_query_sees_what_every_member_allows(names):
    members, mask = chosen(names)
    array = mask.array(NUM_QUERIES, NUM_KEYS)
    expected = reference(members)
    assert (array is None) == (not set(names) - {"positions"})
    if array is not None:
        np.testing.assert_array_equal(np.broadcast_to(array, expected.shape), expected)


@pytest.mark.parametrize("names", SUBSETS, ids="-".join)
def test_attention_weighs_the_keys_that_are_seen(names):
    members, mask = chosen(names)
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, NUM_QUERIES, 2, 4)).astype("float32")
    k, v = rng.normal(size=(2, 2, NUM_KEYS, 2, 4)).astype("float32")
    seen = reference(members)
    weights = np.exp(np.einsum("BTNH,BSNH->BNTS", q, k) / 2) * seen + 1e-30
    expected = np.einsum("BNTS,BSNH->BTNH", weights, v) / weights.sum(-1).swapaxes(1, 2)[..., None]
    out = attend(jnp.asarray(q), KV(jnp.asarray(k), jnp.asarray(v)), mask)
    # A query that sees no key has no right answer.
    answered = np.broadcast_to(seen.any(-1)[:, 0, :, None, None], out.shape)
    np.testing.assert_allclose(out[answered], expected[answered], atol=1e-5)


def test_no_array_is_made_for_what_needs_none():
    assert Mask().flag_and_array(4, 4) == (False, None)
    assert Mask(causal=True).flag_and_array(4, 4) == (True, None)


def test_positions_matter_to_ordered_masks_only():
    assert not Mask(jnp.asarray(MEMBERS["valid"])).ordered
    assert Mask(causal=True).ordered and Mask(block_length=2).ordered


@pytest.mark.parametrize("name", ["block_length", "positions", "written"])
@pytest.mark.parametrize("implementation", ATTENTION[:2], ids=lambda x: x.name)
def test_a_kernel_refuses_a_mask_that_it_does_not_know(implementation, name, monkeypatch):
    """On what passes for its device, and for shapes that it takes."""
    from dials_jax.nn.kernels import per_device

    monkeypatch.setattr(per_device, "on_hopper", lambda: True)
    monkeypatch.setattr(per_device, "on_tpu", lambda: True)
    num_queries = {"tpu_splash": 1024, "hopper_window": 16}[implementation.name]
    q = jnp.ones((2, num_queries, 1, 128), "bfloat16")
    kv = KV(*jnp.ones((2, 2, 1024, 1, 128), "bfloat16"))
    valid = jnp.ones((2, 1024), bool)
    assert implementation.refusal(q, kv, Mask()) is None
    assert implementation.refusal(q, kv, Mask(valid)) is None
    _, mask = chosen([name])
    assert f"no mask with {name}" in implementation.refusal(q, kv, mask)
    takes_causal = implementation.refusal(q, kv, Mask(causal=True)) is None
    assert takes_causal == (implementation.name == "tpu_splash")
