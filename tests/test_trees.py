import chex
import jax.numpy as jnp
import numpy as np

from dials_jax import trees

TREE = {"a": jnp.arange(6.0).reshape(2, 3), "b": {"c": jnp.ones((2, 4)), "d": jnp.arange(2)}}


def test_leaves_are_named_by_their_path():
    names = [name for name, _ in trees.named_leaves({"layers": ({"q": 1}, {"q": 2}), "head": 3})]
    assert sorted(names) == ["head", "layers/0/q", "layers/1/q"]
    doubled = trees.map_named(lambda name, x, y: f"{name}{x}{y}", {"a": 1}, {"a": 2})
    assert doubled == {"a": "a12"}


def test_parameters_are_counted():
    assert trees.count_parameters(TREE) == 6 + 8 + 2


def test_casts_touch_floating_points_only():
    cast = trees.cast(TREE, jnp.bfloat16)
    assert cast["a"].dtype == jnp.bfloat16 and cast["b"]["d"].dtype == TREE["b"]["d"].dtype
    assert trees.cast(TREE, None) is TREE


def test_unstacking_and_stacking_return_the_same():
    layers = trees.unstack(TREE)
    assert trees.is_unrolled(layers) and not trees.is_unrolled(TREE)
    assert trees.num_layers(layers) == trees.num_layers(TREE) == 2
    np.testing.assert_array_equal(layers[1]["a"], [3, 4, 5])
    chex.assert_trees_all_equal(trees.stack(layers), TREE)
