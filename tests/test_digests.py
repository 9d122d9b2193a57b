import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dials_jax import digests, trees


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool"])
def test_a_digest_sees_a_changed_and_an_exchanged_element(dtype):
    x = jnp.arange(-3, 9).reshape(3, 4).astype(dtype)
    digest = digests.digest_hex({"x": x})["x"]
    assert len(digest) == 16 and digest == digests.digest_hex({"x": x})["x"]
    assert digest != digests.digest_hex({"x": x.at[0, 0].set(x.dtype.type(0))})["x"]
    swapped = x.at[0, 0].set(x[0, 3]).at[0, 3].set(x[0, 0])
    assert digest != digests.digest_hex({"x": swapped})["x"]


def test_a_digest_sees_a_single_flipped_bit():
    x = jnp.linspace(0, 1, 50)
    flipped = np.asarray(x).copy()
    flipped.view(np.uint32)[17] ^= 1
    assert digests.digest_hex({"x": x}) != digests.digest_hex({"x": jnp.asarray(flipped)})


def params_of(seed=0, num_layers=3):
    keys = jax.random.split(jax.random.key(seed), 2)
    return {
        "embed": {"table": jax.random.normal(keys[0], (20, 4))},
        "layers": {"w": jax.random.normal(keys[1], (num_layers, 4, 5))},
    }


def test_a_fingerprint_ignores_layout_and_dtype():
    params = params_of()
    fingerprint = digests.fingerprint(params)
    unrolled = {**params, "layers": trees.unstack(params["layers"])}
    assert digests.fingerprint(unrolled) == fingerprint
    assert digests.fingerprint(trees.cast(params, jnp.bfloat16)) == fingerprint
    host = jax.tree.map(lambda x: np.asarray(x).astype(ml_dtypes.bfloat16), params)
    assert digests.fingerprint(host) == fingerprint


def test_a_fingerprint_tells_weights_and_layers_apart():
    params = params_of()
    fingerprint = digests.fingerprint(params)
    assert digests.fingerprint(params_of(seed=1)) != fingerprint
    reversed_layers = {**params, "layers": {"w": params["layers"]["w"][::-1]}}
    assert digests.fingerprint(reversed_layers) != fingerprint
    last = {**params, "layers": {"w": params["layers"]["w"].at[2, 0, 0].add(1)}}
    assert digests.fingerprint(last) != fingerprint


def wide_params(dtype="float32"):
    """Arrays of more elements than the first half of a fingerprint reads."""
    rng = np.random.default_rng(0)

    def one(*shape):
        return (1 + rng.random(shape)).astype(dtype)

    layers = {"mlp": {"up": one(3, 12, 40), "up_bias": one(3, 40)}, "norm": {"scale": one(3, 12)}}
    return {"embed": {"table": one(30, 12)}, "layers": layers, "head": {"kernel": one(12, 30)}}


LEAVES = [name for name, _ in trees.named_leaves(wide_params())]


@pytest.mark.parametrize("dtype", ["float32", ml_dtypes.bfloat16])
@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("place", [0, 0.3, 0.77, 1])
def test_a_fingerprint_sees_one_element_anywhere(leaf, place, dtype):
    def change(name, x):
        x = x.copy()
        if name == leaf:  # by one bit of bfloat16's
            x.reshape(-1)[round(place * (x.size - 1))] += 1 / 64
        return x

    params = wide_params(dtype)
    changed = trees.map_named(change, params)
    assert digests.fingerprint(changed) != digests.fingerprint(params)
    unrolled = {**changed, "layers": trees.unstack(changed["layers"])}
    assert digests.fingerprint(unrolled) == digests.fingerprint(changed)


def exchanged(x, i, j):
    x = x.copy()
    x[i], x[j] = x[j], x[i]
    return x


@pytest.mark.parametrize(
    "change",
    [
        lambda x: exchanged(x, (1, 11, 0), (1, 11, 39)),
        lambda x: exchanged(x, (1, 11), (1, 10)),
        lambda x: x[:, :, ::-1],
        lambda x: exchanged(x, 1, 2),
        lambda x: x * np.where(np.arange(40) >= 38, -1, 1).astype(x.dtype),
        lambda x: np.roll(x, 1),
        lambda x: x.swapaxes(1, 2),
    ],
    ids=["elements", "rows", "columns", "layers", "signs", "shifted", "transposed"],
)
def test_a_fingerprint_sees_elements_in_another_order(change):
    params = wide_params()
    mlp = params["layers"]["mlp"]
    other = {**params, "layers": {**params["layers"], "mlp": {**mlp, "up": change(mlp["up"])}}}
    assert digests.fingerprint(other) != digests.fingerprint(params)


def test_groups_in_any_order_give_the_fingerprint_of_the_whole():
    params, found = wide_params(), digests.Fingerprint()
    found.add({"head": params["head"]})
    for i in (2, 0, 1):
        found.add_layer(i, trees.layer_slice(params["layers"], i))
    found.add({"embed": params["embed"]})
    assert found.hex() == digests.fingerprint(params)


def test_a_fingerprint_of_an_earlier_version_is_accepted_with_a_warning(caplog):
    now = digests.fingerprint(wide_params())
    assert digests.same_weights(now, now, "here") and not caplog.records
    assert digests.same_weights(now[:16], now, "runs/router")
    (record,) = caplog.records
    message = record.getMessage()
    assert "runs/router" in message and "earlier version" in message and "\n" not in message


@pytest.mark.parametrize("change", [lambda x: x[:15], lambda x: x[::-1], lambda x: x[:31], len])
def test_other_fingerprints_are_not_those_of_these_weights(change, caplog):
    now = digests.fingerprint(wide_params())
    assert not digests.same_weights(change(now), now, "") and not digests.same_weights(
        now, now[:16], ""
    )
    assert not digests.same_weights(None, now, "") and not caplog.records


def test_first_elements_count_in_row_order():
    x = np.arange(24).reshape(2, 3, 4)
    np.testing.assert_array_equal(digests.first_elements(x, 10, 5), [10, 11, 12, 13, 14])
