"""Conversion gives the weights, and the numbers, of the published model."""

import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dials_jax import trees
from dials_jax.convert.hugging_face import convert_folder, open_hugging_face, write_model_folder
from dials_jax.data.tokenizer import character_tokenizer, load_tokenizer
from dials_jax.errors import InputError
from dials_jax.loading import load
from dials_jax.models import families, folders, transformer
from dials_jax.nn.block import Embed
from dials_jax.nn.modules import bind
from tests.convert.conftest import main
from tests.data import published

GOLDEN = Path(__file__).parents[1] / "golden" / "llada_tiny"
TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "golden.npz") as arrays:
        return {k: arrays[k] for k in ("input_ids", "logits", "hidden_states", "pad_lengths")} | {
            f"sequence_{i}": arrays[f"unpadded_logits_{i}"] for i in range(3)
        }


@pytest.fixture(scope="module")
def model():
    return load(GOLDEN)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    target = tmp_path_factory.mktemp("converted") / "model"
    assert main([str(GOLDEN), str(target)]) == 0
    return target


def assert_same_bits(a, b):
    chex.assert_trees_all_equal(a, b)
    assert jax.tree.map(lambda x: x.dtype, a) == jax.tree.map(lambda x: x.dtype, b)


# ------------------------------------------------------------------------------- numerics


def test_logits_are_those_of_the_authors_code(model, golden):
    logits = model.apply(golden["input_ids"]).logits
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=TOLERANCE)


def test_every_layer_gives_the_authors_hidden_state(model, golden):
    tokens = jnp.asarray(golden["input_ids"], jnp.int32)
    out = transformer.run_layers(
        model.config, model.params, tokens, None, observe=lambda old, new: new
    )
    embedded = bind(Embed, model.params["embed"], model.config)(tokens)
    last = transformer.apply_final_norm(model.config, model.params, out.observed[-1])
    ours = jnp.concatenate([embedded[None], out.observed[:-1], last[None]])
    for h, theirs in zip(ours, golden["hidden_states"], strict=True):
        # The residual stream grows to 91, and float32's rounding with it: both results lie equally
        # far from the same forward pass in float64.
        np.testing.assert_allclose(h, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())


def test_a_sequence_alone_and_left_padded_gives_the_authors_logits(model, golden):
    lengths = golden["pad_lengths"]
    width = golden["input_ids"].shape[1]
    tokens = np.full((3, width), model.config.pad_id)
    valid = np.arange(width) >= width - lengths[:, None]
    for i, n in enumerate(lengths):
        tokens[i, width - n :] = golden["input_ids"][i, :n]
        alone = model.apply(golden["input_ids"][i : i + 1, :n]).logits[0]
        np.testing.assert_allclose(alone, golden[f"sequence_{i}"], rtol=0, atol=TOLERANCE)
    padded = model.apply(tokens, valid).logits
    for i, n in enumerate(lengths):
        np.testing.assert_allclose(
            padded[i, width - n :], golden[f"sequence_{i}"], rtol=0, atol=TOLERANCE
        )


# ------------------------------------------------------------------------------- weights


def test_a_converted_folder_loads_the_same_parameters_as_its_source(model, converted):
    loaded = load(converted)
    assert loaded.config == model.config
    assert_same_bits(loaded.params, model.params)
    assert loaded.fingerprint == folders.read_info(converted).fingerprint == model.fingerprint


def test_dtype_casts_weights_and_activations_from_either_folder(model, converted):
    from_source, from_converted = load(GOLDEN, "bfloat16"), load(converted, jnp.bfloat16)
    assert from_source.config.dtype == from_converted.config.dtype == "bfloat16"
    assert_same_bits(from_source.params, from_converted.params)
    assert_same_bits(from_source.params, trees.cast(model.params, jnp.bfloat16))
    assert from_source.fingerprint == model.fingerprint


@pytest.mark.parametrize("layout", ["stacked", "unrolled", "fused"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fingerprint_is_that_of_before_and_of_every_element(converted, layout, dtype):
    earlier, every = "f64ed27d52cbf93b", "f93f053952b44f9a"
    for folder in (GOLDEN, converted):
        assert load(folder, dtype, layout=layout).fingerprint == earlier + every


def test_conversion_with_a_dtype_stores_that_dtype(tmp_path):
    convert_folder(GOLDEN, tmp_path / "half", "bfloat16")
    half = load(tmp_path / "half")
    assert half.config.dtype == "bfloat16"
    assert_same_bits(half.params, load(GOLDEN, "bfloat16").params)


def test_heads_and_biases_compute_what_torch_linear_layers_compute(write_folder, tiny_tensors):
    model = load(write_folder(), "float32", layout="unrolled")
    torch = {k: np.asarray(v, np.float32) for k, v in tiny_tensors.items()}
    x = np.random.default_rng(1).normal(size=(5, 32)).astype(np.float32)
    block, layer = "model.transformer.blocks.1.", model.params["layers"][1]

    def linear(name, x):
        return x @ torch[f"{name}.weight"].T + torch[f"{name}.bias"]

    for name, heads in (("q", 4), ("k", 2), ("v", 2)):
        kernel, bias = layer["attention"][name], layer["attention"][f"{name}_bias"]
        ours = jnp.einsum("TD,DNH->TNH", x, kernel) + bias
        theirs = linear(f"{block}{name}_proj", x).reshape(5, heads, 8)
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4)
    heads = x.reshape(5, 4, 8)
    out = jnp.einsum("TNH,NHD->TD", heads, layer["attention"]["o"]) + layer["attention"]["o_bias"]
    np.testing.assert_allclose(out, linear(f"{block}attn_out", x), rtol=1e-5, atol=1e-4)
    up = x @ layer["mlp"]["up"] + layer["mlp"]["up_bias"]
    np.testing.assert_allclose(up, linear(f"{block}up_proj", x), rtol=1e-5, atol=1e-4)
    head = x @ model.params["head"]["kernel"] + model.params["head"]["bias"]
    np.testing.assert_allclose(head, linear("model.transformer.ff_out", x), rtol=1e-5, atol=1e-4)


def test_parameters_stay_on_disk_until_they_are_read(sharded):
    _, params = open_hugging_face(sharded)
    for name, x in trees.named_leaves(params):
        assert x.base is not None and not x.flags.owndata, name


def test_names_without_the_leading_model_are_accepted(write_folder, tiny_tensors):
    short = {name.removeprefix("model."): x for name, x in tiny_tensors.items()}
    _, params = open_hugging_face(write_folder(short))
    np.testing.assert_array_equal(params["embed"]["table"], short["transformer.wte.weight"])


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "bool"])
def test_buffers_are_left_out_whatever_they_are(write_folder, tiny_tensors, dtype):
    name = "model.transformer.blocks.0.rotary_emb.inv_freq"
    buffers = {name: np.ones(4, dtype), "model.position_ids": np.ones(4, dtype)}
    cfg, params = open_hugging_face(write_folder(tiny_tensors | buffers))
    assert cfg.dtype == "bfloat16"  # of the weights alone
    scale = tiny_tensors["model.transformer.ln_f.weight"]
    np.testing.assert_array_equal(params["final_norm"]["scale"], scale)


@pytest.mark.parametrize("dtype", ["float64", "int64", "uint8"])
def test_weights_of_another_dtype_are_refused(write_folder, tiny_tensors, dtype):
    name = "model.transformer.ln_f.weight"
    source = write_folder(tiny_tensors | {name: np.ones(32, dtype)})
    with pytest.raises(InputError, match=f"{name}' is {dtype}; weights must be"):
        open_hugging_face(source)


def test_names_of_a_compiled_or_wrapped_model_are_those_inside(write_folder, tiny_tensors):
    wrapped = {
        n.replace("model.", "module._orig_mod.model.", 1): x for n, x in tiny_tensors.items()
    }
    _, params = open_hugging_face(write_folder(wrapped))
    np.testing.assert_array_equal(
        params["embed"]["table"], tiny_tensors["model.transformer.wte.weight"]
    )


def test_tensors_both_plain_and_wrapped_are_refused(write_folder, tiny_tensors):
    name = "model.transformer.ln_f.weight"
    with pytest.raises(InputError, match="twice"):
        open_hugging_face(write_folder(tiny_tensors | {f"_orig_mod.{name}": tiny_tensors[name]}))


# ------------------------------------------------------------------------------- settings


def test_settings_follow_upstream_where_they_are_absent(write_folder):
    cfg, _ = open_hugging_face(write_folder())
    assert (cfg.vocab_size, cfg.num_kv_heads, cfg.pad_id) == (41, 2, 1)
    assert (cfg.qkv_bias, cfg.o_bias, cfg.mlp_bias, cfg.head_bias) == (True,) * 4
    assert (cfg.eot_id, cfg.dtype) == (None, "bfloat16")


def test_queries_keys_and_values_may_be_all_that_has_biases(write_folder, tiny_tensors):
    kept = {
        name: x
        for name, x in tiny_tensors.items()
        if not name.endswith(".bias")
        or name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias"))
    }
    cfg, params = open_hugging_face(write_folder(kept, include_bias=False))
    assert cfg.qkv_bias and not (cfg.o_bias or cfg.mlp_bias or cfg.head_bias)
    expected = kept["model.transformer.blocks.1.k_proj.bias"].reshape(2, 8)
    np.testing.assert_array_equal(params["layers"][1]["attention"]["k_bias"], expected)


def test_multi_query_attention_means_one_key_head():
    from dials_jax.convert.llada import translate_config
    from dials_jax.files import read_json

    values = read_json(GOLDEN / "config.json") | {"n_kv_heads": None}
    assert translate_config(values, "float32").num_kv_heads == 4
    assert translate_config(values | {"multi_query_attention": True}, "float32").num_kv_heads == 1


def test_the_published_configuration_becomes_the_preset():
    from dials_jax.convert.llada import translate_config
    from dials_jax.files import read_json

    published = dict(
        d_model=4096, n_heads=32, n_kv_heads=32, n_layers=32, mlp_hidden_size=12288,
        vocab_size=126464, embedding_size=126464, max_sequence_length=4096, rope_theta=500000.0,
        mask_token_id=126336, eos_token_id=126081, pad_token_id=126081,
    )  # fmt: skip
    values = read_json(GOLDEN / "config.json") | published
    assert translate_config(values, "bfloat16") == families.llada_8b()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_dtype_other_than_bfloat16_is_kept_exactly_as_float32(write_folder, tiny_tensors, dtype):
    key = "model.transformer.ln_f.weight"
    tensors = tiny_tensors | {key: np.full(32, 1.001, dtype)}
    model = load(write_folder(tensors))
    assert model.config.dtype == "float32"
    scale = model.params["final_norm"]["scale"]
    np.testing.assert_array_equal(scale, np.full(32, 1.001, dtype).astype(np.float32))
    assert model.params["embed"]["table"].dtype == jnp.float32
    assert tensors["model.transformer.wte.weight"].dtype == ml_dtypes.bfloat16


def test_tokenizer_files_come_along(write_folder, tmp_path):
    source = write_folder()
    (source / "tokenizer.json").write_text("{}")
    (source / "README.md").write_text("not a tokenizer")
    with pytest.warns(UserWarning, match=r"copied as they are: .*source is not a tokenizer"):
        convert_folder(source, tmp_path / "target")
    assert (tmp_path / "target" / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "target" / "README.md").exists()


def lay_out(kind, folder):
    source = getattr(published, kind.removesuffix("_alone"))(folder)
    if kind == "qwen2_alone":  # nothing but its config.json says what kind it is
        (source / "tokenizer_config.json").unlink()
    if kind == "gpt2_alone":
        (source / "tokenizer.json").unlink()
    return source


@pytest.mark.parametrize("kind", ["gpt2", "gpt2_alone", "qwen2", "qwen2_alone", "dream", "llada"])
def test_a_converted_folder_has_the_ids_of_its_source(kind, write_folder, tmp_path, monkeypatch):
    source = lay_out(kind, tmp_path / "tokenizer")
    expected = load_tokenizer(source)
    target = tmp_path / "target"
    cfg, params = open_hugging_face(write_folder())
    write_model_folder(target, cfg, params, source)
    monkeypatch.setitem(sys.modules, "transformers", None)  # what is converted needs it no more
    found = load_tokenizer(target)
    assert found.fingerprint == expected.fingerprint
    assert found.encode_batch(published.texts()) == expected.encode_batch(published.texts())
    copied = {file.name for file in source.iterdir()} - {"config.json", "tokenization_dream.py"}
    assert copied <= {file.name for file in target.iterdir()}


def test_links_of_the_cache_are_followed_and_others_named(write_folder, tmp_path, recwarn):
    cache, source = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "1"
    cache.mkdir(parents=True)
    source.mkdir(parents=True)
    character_tokenizer("abc").save(cache)
    (source / "tokenizer.json").symlink_to("../../blobs/tokenizer.json")
    cfg, params = open_hugging_face(write_folder())
    write_model_folder(tmp_path / "target", cfg, params, source)
    assert not [w for w in recwarn if "link" in str(w.message)]
    copy = tmp_path / "target" / "tokenizer.json"
    assert not copy.is_symlink() and copy.read_bytes() == (cache / copy.name).read_bytes()
    (tmp_path / "far").mkdir()
    (cache / copy.name).rename(tmp_path / "far" / copy.name)
    (source / copy.name).unlink()
    (source / copy.name).symlink_to(tmp_path / "far" / copy.name)
    with pytest.warns(
        UserWarning, match=r"tokenizer.json is a link; .*far/tokenizer.json is copied"
    ):
        write_model_folder(tmp_path / "again", cfg, params, source)
