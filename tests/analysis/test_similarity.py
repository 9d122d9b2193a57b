import jax
import jax.numpy as jnp
import numpy as np

from dials_jax.models import transformer
from dials_jax.models.model import Model
from dials_jax.skipping.similarity import layer_similarities

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
