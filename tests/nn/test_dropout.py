"""Dropout against what it does to each number, and its independence of everything but its keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dials_jax import trees
from dials_jax.models import transformer
from dials_jax.nn.dropout import AFTER_ATTENTION, AFTER_MLP, Dropout, numbered
from dials_jax.nn.modules import PLAIN

RATE = 0.3
KEYS = jax.random.split(jax.random.key(4), 3)
TOKENS = jax.random.randint(jax.random.key(1), (3, 16), 0, 60)


def streams(cfg, params, dropout, tokens=TOKENS, **options):
    run = jax.jit(lambda params, d: transformer.run_layers(
        cfg, params, tokens, None, dropout=d, **options
    ).h)  # fmt: skip
    return np.asarray(run(params, dropout))


def test_numbers_are_zeroed_at_the_rate_and_the_mean_stays():
    x = jnp.ones((3, 200, 500))
    out = np.asarray(Dropout(KEYS, RATE)(x, AFTER_MLP))
    np.testing.assert_allclose(np.unique(out), [0, 1 / (1 - RATE)], rtol=1e-6)
    error = 5 * (RATE * (1 - RATE) / x.size) ** 0.5
    assert abs((out == 0).mean() - RATE) < error
    assert abs(out.mean() - 1) < error / (1 - RATE)


def test_rows_layers_and_places_draw_by_themselves():
    x, dropout = jnp.ones((3, 100, 100)), Dropout(KEYS, 0.5)
    draws = [
        dropout.of_layer(layer)(x, place)[row]
        for layer in (0, 1) for place in (AFTER_ATTENTION, AFTER_MLP) for row in range(3)
    ]  # fmt: skip
    for i, a in enumerate(draws):
        for b in draws[:i]:
            assert abs(np.mean((a == 0) == (b == 0)) - 0.5) < 0.025


@pytest.mark.parametrize("silent", ["attention/o", "mlp/down"])
def test_a_block_drops_what_attention_and_the_mlp_add(lively, silent):
    """With one of them silent, each number of the other's update is gone or divided by 1 - rate."""

    def first_layer(name, x):
        return jnp.zeros_like(x[:1]) if name == silent else x[:1]

    cfg = lively.config
    layers = trees.map_named(first_layer, lively.params["layers"])
    params = {**lively.params, "layers": layers}
    assert any((x == 0).all() for x in jax.tree.leaves(layers))
    rows = transformer.block_inputs(cfg, None, TOKENS.shape)
    before = np.asarray(transformer.embed(cfg, params, TOKENS, rows))
    update = streams(cfg, params, None) - before
    found = streams(cfg, params, Dropout(KEYS, RATE)) - before
    gone = np.abs(found) < 1e-6
    assert abs(gone.mean() - RATE) < 5 * (RATE * (1 - RATE) / gone.size) ** 0.5
    np.testing.assert_allclose(found[~gone], update[~gone] / (1 - RATE), rtol=1e-3, atol=1e-5)


def test_every_layer_draws_by_its_own_number(lively):
    """Against one layer after the other, each told its number by hand."""
    cfg, params, dropout = lively.config, lively.params, Dropout(KEYS, RATE)
    rows = transformer.block_inputs(cfg, None, TOKENS.shape)
    h = transformer.embed(cfg, params, TOKENS, rows)
    for number in range(cfg.num_layers):
        layer = trees.layer_slice(params["layers"], number)
        here = rows._replace(dropout=dropout.of_layer(number))
        h = transformer.layer_of(cfg, PLAIN).block(layer, h, here)
    np.testing.assert_allclose(streams(cfg, params, dropout), h, atol=1e-4)


def test_a_row_draws_the_same_in_any_batch_layout_and_with_recomputation(lively):
    cfg, stacked = lively.config, lively.params
    unrolled = {**stacked, "layers": trees.unstack(stacked["layers"])}
    whole = streams(cfg, stacked, Dropout(KEYS, RATE))
    assert np.abs(whole - streams(cfg, stacked, None)).mean() > 0.1
    for params in (stacked, unrolled):
        for remat in (False, True):
            found = streams(cfg, params, Dropout(KEYS, RATE), remat=remat)
            np.testing.assert_allclose(found, whole, atol=1e-4)
    alone = streams(cfg, stacked, Dropout(KEYS[1:2], RATE), tokens=TOKENS[1:2])
    np.testing.assert_allclose(alone, whole[1:2], atol=1e-4)


@pytest.mark.parametrize("unrolled", [False, True])
def test_layers_know_their_numbers(lively, unrolled):
    layers = lively.params["layers"]
    layers = numbered(trees.unstack(layers) if unrolled else layers)
    found = [trees.layer_slice(layers, i) for i in range(lively.num_layers)]
    assert [int(x["number"]) for x in found] == list(range(lively.num_layers))
