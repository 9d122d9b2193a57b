"""A causal model goes on as a diffusion model: from exactly its weights, with a new [MASK]."""

import dataclasses

import chex
import numpy as np
import pytest

from dials_jax import trees
from dials_jax.config import ObjectiveConfig, OptimizerConfig
from dials_jax.errors import InputError
from dials_jax.loading import load
from dials_jax.models.folders import save_model
from dials_jax.training.loop import train
from tests.conftest import init_params

# The characters of the arithmetic task are 18, and its [MASK] is the last.
AT_REST = OptimizerConfig(learning_rate=1e-9, num_steps=1, warmup_steps=0, weight_decay=0.0)


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    """Makes the folder of a random causal model over the first `vocab_size` characters."""

    def make(cfg, vocab_size, seed=7, **changes):
        folder = tmp_path_factory.mktemp("causal")
        values = {
            "vocab_size": vocab_size,
            "causal": True,
            "right_shift": False,
            "mask_id": None,
        } | changes
        cfg = dataclasses.replace(cfg, **values)
        save_model(folder / "model", cfg, init_params(cfg, seed))
        return folder

    return make


@pytest.mark.parametrize("vocab_size", [18, 19])
def test_training_starts_from_exactly_the_causal_models_weights(
    vocab_size, causal, train_config, tmp_path
):
    model = dataclasses.replace(train_config().model, right_shift=True)
    source = causal(model, vocab_size)
    cfg = train_config(model=model, init_from=str(source), optimizer=AT_REST)
    state = train(cfg, tmp_path)
    old = dict(trees.named_leaves(load(source, layout="stacked").params))
    for name, x in trees.named_leaves(state.params):
        if name == "embed/table":
            mean, x = x[vocab_size:], x[:vocab_size]
            np.testing.assert_allclose(mean, old[name].mean(axis=0)[None][: len(mean)], atol=1e-6)
        if name == "head/kernel":
            x = x[:, :vocab_size]
        np.testing.assert_allclose(x, old[name], atol=1e-7, err_msg=name)
    assert load(tmp_path).config.right_shift


def test_a_continued_model_resumes_and_remembers_its_source(causal, train_config, tmp_path):
    model = dataclasses.replace(train_config().model, right_shift=True)
    source = causal(model, 18)
    cfg = train_config(
        model=model, init_from=str(source), objective=ObjectiveConfig(kind="mdlm")
    )  # fmt: skip
    train(dataclasses.replace(cfg, max_minutes=1e-9), tmp_path / "parts")
    parts, whole = train(cfg, tmp_path / "parts"), train(cfg, tmp_path / "whole")
    chex.assert_trees_all_equal(parts, whole)
    moved, other = (causal(model, 18, seed=seed) for seed in (7, 8))
    train(dataclasses.replace(cfg, init_from=str(moved)), tmp_path / "parts")
    with pytest.raises(InputError, match="holds another experiment \\(source_fingerprint"):
        train(dataclasses.replace(cfg, init_from=str(other)), tmp_path / "parts")


@pytest.mark.parametrize(
    "vocab_size, changes, message",
    [
        (20, {}, "has 20 tokens and this model 19; a vocabulary may grow, not shrink"),
        (18, {"d_ff": 64}, r"layers/mlp/down is \(2, 64, 32\) there and must be \(2, 128, 32\)"),
        (18, {"qkv_bias": True}, "this model has no layers/attention/"),
        (18, {"num_layers": 1}, r"is \(1, .*there and must be \(2, "),
        (18, {"rope_theta": 5e5}, "were trained with rope_theta=500000.0, not 10000.0; take the"),
        (18, {"norm": "layer"}, "were trained with norm='layer', not 'rms'"),
        (18, {"norm_eps": 1e-2}, "were trained with norm_eps=0.01, not 1e-05"),
    ],
)
def test_a_source_of_another_shape_or_maths_is_refused_in_one_line(
    vocab_size, changes, message, causal, train_config, tmp_path
):
    source = causal(train_config().model, vocab_size, **changes)
    with pytest.raises(InputError, match=message) as error:
        train(train_config(init_from=str(source)), tmp_path / "run")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_routers_take_no_source(train_config):
    with pytest.raises(InputError, match="init_from= is for training a model"):
        train_config("somewhere", init_from="elsewhere")
