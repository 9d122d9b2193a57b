import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dials_jax.errors import InputError
from dials_jax.models import transformer
from dials_jax.models.model import Model
from dials_jax.skipping.similarity import choose_static_layers, layer_similarities, mean_cosine

# Descending: layers 3 (.99), 2 (.98), 5 (.97), 0 (.96), 6 (.955), 1 (.9), 4 (.8)
SIMILARITIES = [0.96, 0.90, 0.98, 0.99, 0.80, 0.97, 0.955]


@pytest.mark.parametrize(
    "max_skipped, expected",
    [
        (0, ()),
        (1, (3,)),
        (2, (3, 5)),  # 2 is next to 3
        (3, (0, 3, 5)),
        (7, (0, 3, 5)),  # 6 is next to 5; 1 and 4 are below the threshold
    ],
)
def test_goels_algorithm_1_by_hand(max_skipped, expected):
    assert choose_static_layers(SIMILARITIES, max_skipped) == expected


def test_the_threshold_is_inclusive():
    assert choose_static_layers(SIMILARITIES, 3, threshold=0.97) == (3, 5)
    assert choose_static_layers(SIMILARITIES, 3, threshold=0.971) == (3,)


def test_without_a_threshold_only_adjacency_limits():
    assert choose_static_layers([0.1, 0.2, 0.3, 0.4], 4, threshold=None) == (1, 3)


def test_adjacent_layers_can_be_allowed():
    assert choose_static_layers(SIMILARITIES, 3, allow_adjacent=True) == (2, 3, 5)


def test_the_first_of_equal_layers_goes_first():
    assert choose_static_layers([0.99] * 5, 2) == (0, 2)


def test_a_negative_number_is_refused():
    with pytest.raises(InputError, match="max_skipped=-1"):
        choose_static_layers(SIMILARITIES, -1)


def test_cosine_by_hand():
    before = jnp.array([[[3.0, 4.0], [1.0, 0.0], [1.0, 1.0]]])
    after = jnp.array([[[6.0, 8.0], [0.0, 2.0], [-5.0, -5.0]]])  # cosines 1, 0, -1
    where = jnp.array([[True, True, False]])
    np.testing.assert_allclose(mean_cosine(before, after, where), [0.5], rtol=1e-6)


def test_a_row_without_positions_counts_as_zero():
    h = jnp.ones((1, 2, 3))
    np.testing.assert_array_equal(mean_cosine(h, h, jnp.zeros((1, 2), bool)), [0])


# ------------------------------------------------------------------------- measured on prompts

PROMPTS = [(3, 4, 5, 6, 7), (8, 9), (10, 11)]


def by_hand(model, prompt, gen_length):
    """Cosines over the positions of a prompt that is alone, layer by layer."""
    cfg = model.config
    tokens = jnp.array([[*prompt, *[cfg.mask_id] * gen_length]])
    states = jax.jit(
        lambda params: (
            transformer.run_layers(
                cfg, params, tokens, None, observe=lambda before, after: (before, after)
            ).observed
        )
    )
    before, after = (np.asarray(x)[:, 0, : len(prompt)] for x in states(model.params))
    norms = np.linalg.norm(before, axis=-1) * np.linalg.norm(after, axis=-1)
    return ((before * after).sum(-1) / norms).mean(axis=-1)


def test_similarities_by_hand(model):
    expected = np.mean([by_hand(model, prompt, 4) for prompt in PROMPTS], axis=0)
    found = layer_similarities(model, PROMPTS, gen_length=4, batch_size=3)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found.shape == (4,)


def test_batches_do_not_matter(model):
    whole = layer_similarities(model, PROMPTS, gen_length=4, batch_size=3)
    np.testing.assert_allclose(
        layer_similarities(model, PROMPTS, gen_length=4, batch_size=2), whole, atol=1e-6
    )


def test_a_layer_that_does_nothing_has_similarity_1(model):
    layers = model.params["layers"]
    silent = {
        **layers,
        "attention": {**layers["attention"], "o": layers["attention"]["o"].at[2].set(0)},
        "mlp": {**layers["mlp"], "down": layers["mlp"]["down"].at[2].set(0)},
    }
    found = layer_similarities(
        Model(model.config, {**model.params, "layers": silent}), PROMPTS, gen_length=4, batch_size=3
    )
    np.testing.assert_allclose(found[2], 1, atol=1e-6)
    assert (np.delete(found, 2) < 0.9999).all()
