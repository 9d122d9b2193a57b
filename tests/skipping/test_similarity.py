from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dials_jax.errors import InputError
from dials_jax.loading import load
from dials_jax.models import transformer
from dials_jax.models.model import Model
from dials_jax.skipping.similarity import (
    choice_shares,
    choose_static_layers,
    layer_similarities,
    mean_cosine,
    prompt_similarities,
    require_enough_layers,
)

GOLDEN = Path(__file__).parents[1] / "golden"

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


def plain_choice(similarities, most, threshold, allow_adjacent):
    """Goel, Algorithm 1 as it is printed, but for the last line: layers count from 0."""
    skipped = set()
    for layer in sorted(range(len(similarities)), key=lambda i: -similarities[i]):
        near = set() if allow_adjacent else {layer - 1, layer + 1}
        if len(skipped) < most and not near & skipped and similarities[layer] >= threshold:
            skipped.add(layer)
    return tuple(sorted(skipped))


@pytest.mark.parametrize("allow_adjacent", [False, True])
def test_choices_are_those_of_the_printed_algorithm(allow_adjacent):
    rng = np.random.default_rng(0)
    for _ in range(200):
        similarities = rng.integers(80, 100, rng.integers(1, 12)) / 100  # with ties
        most = int(rng.integers(0, 13))
        found = choose_static_layers(similarities, most, 0.9, allow_adjacent)
        assert found == plain_choice(similarities, most, 0.9, allow_adjacent)


@pytest.mark.parametrize("num_layers, most", [(4, 2), (5, 3), (32, 16)])
def test_more_layers_than_fit_are_refused(num_layers, most):
    require_enough_layers(most, num_layers)
    require_enough_layers(num_layers - 1, num_layers, allow_adjacent=True)
    with pytest.raises(InputError) as error:
        require_enough_layers(most + 1, num_layers)
    assert str(error.value).startswith(
        f"cannot skip {most + 1} of {num_layers} layers without neighbours: at most {most} fit;"
    )
    assert len(choose_static_layers(np.linspace(0, 1, num_layers), num_layers, None)) <= most
    first = [1.0 - layer % 2 for layer in range(num_layers)]  # the most that fit
    assert len(choose_static_layers(first, num_layers, None)) == most


def test_shares_of_prompts_by_hand():
    """Goel, Figure 8: every prompt chooses for itself, which their mean need not follow."""
    by_prompt = np.array([[0.99, 0.98, 0.5, 0.97], [0.5, 0.97, 0.99, 0.98]])
    np.testing.assert_array_equal(choice_shares(by_prompt, 2), [0.5, 0, 0.5, 0.5])
    np.testing.assert_array_equal(
        choice_shares(by_prompt, 2, allow_adjacent=True), [0.5, 0.5, 0.5, 0.5]
    )
    np.testing.assert_array_equal(choice_shares(by_prompt, 1, threshold=0.995), [0, 0, 0, 0])


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
    masks = [] if cfg.causal else [cfg.mask_id] * gen_length
    tokens = jnp.array([[*prompt, *masks]])
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


@pytest.mark.parametrize("name", ["llada_tiny", "dream_tiny", "qwen2_tiny"])
def test_every_family_is_measured_prompt_by_prompt(name):
    """A causal model's states of a prompt do not depend on what follows, so no length is needed."""
    golden = load(GOLDEN / name)
    length = None if golden.config.causal else 3
    found = prompt_similarities(golden, PROMPTS, length, batch_size=2)
    expected = [by_hand(golden, prompt, 3) for prompt in PROMPTS]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    mean = layer_similarities(golden, PROMPTS, length, batch_size=3)
    np.testing.assert_allclose(mean, np.mean(expected, axis=0), atol=1e-5)
    if golden.config.causal:
        np.testing.assert_array_equal(layer_similarities(golden, PROMPTS, 5, batch_size=3), mean)


def test_the_authors_hidden_states_give_the_same_similarities():
    with np.load(GOLDEN / "llada_tiny" / "golden.npz") as arrays:
        tokens, states = arrays["input_ids"], arrays["hidden_states"].astype(np.float64)
    before, after = states[:-1], states[1:]
    norms = np.linalg.norm(before, axis=-1) * np.linalg.norm(after, axis=-1)
    expected = ((before * after).sum(-1) / norms).mean(axis=-1).T  # [N, L]
    found = prompt_similarities(load(GOLDEN / "llada_tiny"), tokens.tolist(), 0, batch_size=3)
    # Their last state is the one after the final norm.
    np.testing.assert_allclose(found[:, :-1], expected[:, :-1], atol=1e-5)


@pytest.mark.parametrize(
    "prompts, gen_length, message",
    [
        ([], 4, "there are no prompts"),
        ([(3, 4), ()], 4, "prompt 1 is empty"),
        (PROMPTS, None, "gen_length=None: a masked diffusion model needs this many masks"),
        ([(3, 64)], 4, "prompt 0 has token 64, outside the vocabulary"),
    ],
)
def test_what_cannot_be_measured_is_one_line(prompts, gen_length, message, model):
    with pytest.raises(InputError, match=message) as error:
        prompt_similarities(model, prompts, gen_length)
    assert "\n" not in str(error.value)


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
