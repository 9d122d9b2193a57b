"""Dream and Qwen2, which share tensors and names: numbers, settings and tied heads."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dials_jax.convert import dream, qwen2
from dials_jax.convert.hugging_face import convert_folder, open_hugging_face
from dials_jax.convert.safetensors_reader import open_tensors
from dials_jax.errors import InputError
from dials_jax.evaluation.likelihood import log_likelihood
from dials_jax.files import read_json
from dials_jax.loading import load
from dials_jax.models import transformer
from dials_jax.models.families import dream_7b, qwen2_5_7b
from dials_jax.models.model import Model
from tests.convert.conftest import main, write_safetensors
from tests.convert.test_convert import TOLERANCE, assert_same_bits

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = ("dream_tiny", "qwen2_tiny")


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def golden(name):
    with np.load(GOLDEN / name / "golden.npz") as arrays:
        return {k: arrays[k] for k in arrays.files}


@pytest.fixture(scope="module")
def model(name):
    return load(GOLDEN / name)


@pytest.fixture
def edited(tmp_path):
    """Copies a golden folder with changes to its config.json; None removes an entry."""

    def make(name, **changes):
        folder = tmp_path / "edited"
        shutil.copytree(GOLDEN / name, folder, ignore=shutil.ignore_patterns("*.npz"))
        values = read_json(folder / "config.json") | changes
        values = {k: v for k, v in values.items() if v != "absent"}
        (folder / "config.json").write_text(json.dumps(values))
        return folder

    return make


# ------------------------------------------------------------------------------- numerics


def test_logits_are_those_of_the_authors_code(model, golden):
    logits = model.apply(golden["input_ids"]).logits
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=TOLERANCE)


def test_the_head_itself_is_dreams_unshifted_one():
    model = load(GOLDEN / "dream_tiny")
    with np.load(GOLDEN / "dream_tiny" / "golden.npz") as arrays:
        tokens, raw = jnp.asarray(arrays["input_ids"], jnp.int32), arrays["logits_unshifted"]

    @jax.jit
    def head_logits(params):
        h = transformer.run_layers(model.config, params, tokens, None).h
        return transformer.head_logits(model.config, params, h)

    logits = head_logits(model.params)
    np.testing.assert_allclose(logits, raw, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("change", ["rope_theta", "norm_eps", "causal"])
def test_what_tells_the_models_apart_changes_the_logits(model, golden, change):
    cfg = model.config
    value = {"rope_theta": 1e4, "norm_eps": 1e-3, "causal": not cfg.causal}[change]
    special = {"mask_id": 299, "eos_id": 0, "right_shift": False}
    other = Model(dataclasses.replace(cfg, **(special | {change: value})), model.params)
    same = Model(dataclasses.replace(cfg, **special), model.params)
    tokens = golden["input_ids"]
    assert np.abs(other.apply(tokens).logits - same.apply(tokens).logits).max() > 10 * TOLERANCE


# ------------------------------------------------------------------------------- weights


def test_a_converted_folder_loads_the_same_model_as_its_source(name, model, tmp_path):
    assert main([str(GOLDEN / name), str(tmp_path / "target")]) == 0
    loaded = load(tmp_path / "target")
    assert loaded.config == model.config
    assert_same_bits(loaded.params, model.params)


def test_a_tied_head_is_the_embedding(edited, tmp_path):
    source = edited("qwen2_tiny", tie_word_embeddings=True)
    tensors = open_tensors(GOLDEN / "qwen2_tiny")
    del tensors["lm_head.weight"]
    for file in source.glob("*.safetensors*"):
        file.unlink()
    write_safetensors(source / "model.safetensors", tensors)
    convert_folder(source, tmp_path / "target")
    params = load(tmp_path / "target").params
    np.testing.assert_array_equal(params["head"]["kernel"].T, params["embed"]["table"])
    values = read_json(source / "config.json") | {"tie_word_embeddings": False}
    (source / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"lacks tensor 'lm_head\.weight'"):
        open_hugging_face(source)


# ------------------------------------------------------------------------------- settings

PUBLISHED = dict(
    hidden_size=3584, intermediate_size=18944, max_position_embeddings=131072,
    num_attention_heads=28, num_hidden_layers=28, num_key_value_heads=4, rms_norm_eps=1e-6,
    rope_theta=1000000.0, vocab_size=152064, hidden_act="silu", use_sliding_window=False,
    sliding_window=131072, tie_word_embeddings=False, bos_token_id=151643, eos_token_id=151643,
)  # fmt: skip


def test_the_published_configurations_become_the_presets():
    assert qwen2.translate_config(PUBLISHED, "bfloat16") == qwen2_5_7b()
    values = PUBLISHED | {"mask_token_id": 151666, "pad_token_id": 151643}
    assert dream.translate_config(values, "bfloat16") == dream_7b()


def test_the_base_of_the_angles_is_found_where_either_transformers_puts_it(edited):
    old, _ = open_hugging_face(edited("qwen2_tiny", rope_parameters="absent", rope_theta=5e4))
    assert old.rope_theta == 5e4
    new = PUBLISHED | {"rope_parameters": {"rope_type": "default", "rope_theta": 7e4}}
    assert qwen2.translate_config(new, "float32").rope_theta == 7e4


@pytest.mark.parametrize(
    "option",
    [
        {"hidden_act": "gelu"},
        {"use_sliding_window": True},
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0}},
        {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}, "rope_theta": "absent"},
        {"num_key_value_heads": "absent"},
    ],
    ids=lambda option: next(iter(option)),
)
def test_an_option_that_is_not_implemented_is_named(edited, option):
    names = {*option, "rope_type"} if "rope" in next(iter(option)) else option
    with pytest.raises(InputError) as caught:
        open_hugging_face(edited("qwen2_tiny", **option))
    assert any(name in str(caught.value) for name in names) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["mask_token_id", "eos_token_id"])
def test_dream_needs_its_special_tokens(edited, name):
    with pytest.raises(InputError, match=r"(mask|eos)_(token_)?id is missing"):
        open_hugging_face(edited("dream_tiny", **{name: None}))


def test_a_model_without_a_mask_is_scored_by_its_own_next_tokens():
    model = load(GOLDEN / "qwen2_tiny")
    assert (model.config.mask_id, model.config.eos_id, model.config.pad_id) == (None, None, 0)
    logits = model.apply(np.array([[3, 4, 5, 6]])).logits[0]
    expected = jax.nn.log_softmax(logits)[np.arange(1, 3), [5, 6]].sum()
    np.testing.assert_allclose(log_likelihood(model, [3, 4], [5, 6]), expected, rtol=1e-5)
