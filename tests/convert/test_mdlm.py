"""MDLM and GPT-2: the authors' numbers from folders and from a Lightning checkpoint."""

import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dials_jax.convert import gpt2, mdlm
from dials_jax.convert.hugging_face import open_hugging_face
from dials_jax.convert.lightning import open_lightning
from dials_jax.convert.safetensors_reader import open_tensors
from dials_jax.diffusion.subs import subs_log_probs
from dials_jax.errors import InputError
from dials_jax.files import read_json
from dials_jax.loading import load
from dials_jax.models import families
from tests.convert.conftest import main, write_safetensors
from tests.convert.test_convert import TOLERANCE, assert_same_bits

GOLDEN = Path(__file__).parents[1] / "golden"
LAYOUTS = ("stacked", "unrolled", "fused")


def golden(name, file="golden.npz"):
    with np.load(GOLDEN / name / file) as arrays:
        return {k: arrays[k] for k in arrays.files}


@pytest.fixture
def edited(tmp_path):
    """Copies a golden folder, with changes to its config.json and tensors."""

    def make(name, tensors=None, **changes):
        folder = tmp_path / "edited"
        folder.mkdir()
        values = read_json(GOLDEN / name / "config.json") | changes
        (folder / "config.json").write_text(json.dumps(values))
        write_safetensors(
            folder / "model.safetensors", tensors or dict(open_tensors(GOLDEN / name))
        )
        return folder

    return make


# ------------------------------------------------------------------------------- numerics


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mdlm_gives_the_authors_logits_and_log_probabilities(layout):
    values, model = golden("mdlm_tiny"), load(GOLDEN / "mdlm_tiny", layout=layout)
    tokens = jnp.asarray(values["input_ids"])
    logits = model.apply(tokens).logits
    np.testing.assert_allclose(logits, values["raw_logits"], rtol=0, atol=TOLERANCE)
    log_p = subs_log_probs(logits, tokens, model.config.mask_id)
    np.testing.assert_allclose(log_p, values["log_p_x0"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gpt2_gives_the_authors_logits_and_loss(layout):
    values, model = golden("gpt2_tiny"), load(GOLDEN / "gpt2_tiny", layout=layout)
    tokens = values["input_ids"]
    logits = model.apply(tokens).logits
    np.testing.assert_allclose(logits, values["logits"], rtol=0, atol=TOLERANCE)
    log_p = jax.nn.log_softmax(logits[:, :-1])
    loss = -np.take_along_axis(np.asarray(log_p), tokens[:, 1:, None], axis=-1).mean()
    np.testing.assert_allclose(loss, values["loss"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["mdlm_tiny", "gpt2_tiny"])
def test_a_converted_folder_loads_the_same_model_as_its_source(name, tmp_path):
    assert main([str(GOLDEN / name), str(tmp_path / "target")]) == 0
    source, loaded = load(GOLDEN / name), load(tmp_path / "target", layout="fused")
    assert loaded.config == source.config
    assert loaded.fingerprint == source.fingerprint
    assert_same_bits(load(tmp_path / "target").params, source.params)


# ------------------------------------------------------------------------------- names


def test_other_prefixes_and_buffers_change_nothing(edited):
    tensors = {f"backbone.{n}": x for n, x in open_tensors(GOLDEN / "mdlm_tiny").items()}
    _, params = open_hugging_face(edited("mdlm_tiny", tensors))
    assert_same_bits(params, open_hugging_face(GOLDEN / "mdlm_tiny")[1])


def test_gpt2_without_a_prefix_and_with_the_causal_pattern(edited):
    tensors = open_tensors(GOLDEN / "gpt2_tiny")
    tensors = {n.removeprefix("transformer."): x for n, x in tensors.items()}
    for layer, dtype in enumerate((np.float32, np.uint8, np.bool_)):
        tensors[f"h.{layer}.attn.bias"] = np.tri(64, dtype=dtype)[None, None]
        tensors[f"h.{layer}.attn.masked_bias"] = np.array(-10000.0).astype(dtype)
    _, params = open_hugging_face(edited("gpt2_tiny", tensors))
    assert_same_bits(params, open_hugging_face(GOLDEN / "gpt2_tiny")[1])
    np.testing.assert_array_equal(params["head"]["kernel"].T, params["embed"]["table"])


def test_an_untied_head_must_be_there(edited):
    with pytest.raises(InputError, match=r"lacks tensor 'lm_head\.weight'"):
        open_hugging_face(edited("gpt2_tiny", tie_word_embeddings=False))


@pytest.mark.parametrize(
    "option",
    [
        {"activation_function": "relu"},
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False},
    ],
    ids=lambda option: next(iter(option)),
)
def test_an_option_that_is_not_implemented_is_named(edited, option):
    with pytest.raises(InputError, match=next(iter(option))):
        open_hugging_face(edited("gpt2_tiny", **option))


def test_the_published_configurations_become_the_presets():
    values = dict(
        hidden_dim=768, cond_dim=128, n_blocks=12, n_heads=12, vocab_size=50258,
        model_length=1024, time_conditioning=False,
    )  # fmt: skip
    assert mdlm.translate_config(values, "bfloat16") == families.mdlm()
    assert mdlm.translate_config(values | {"time_conditioning": True}, "bfloat16").time_conditioning
    values = dict(
        n_embd=768, n_head=12, n_layer=12, n_positions=1024, vocab_size=50257,
        layer_norm_epsilon=1e-5, eos_token_id=50256,
    )  # fmt: skip
    assert gpt2.translate_config(values, "bfloat16") == families.gpt2()
    large = values | dict(n_embd=1280, n_head=20, n_layer=36)
    assert gpt2.translate_config(large, "bfloat16") == families.gpt2_large()


# ------------------------------------------------------------------------------- checkpoints


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of the golden checkpoint, alone in its folder."""
    (tmp_path / "run").mkdir()
    return Path(shutil.copy(GOLDEN / "mdlm_tiny" / "mdlm.ckpt", tmp_path / "run"))


def rewrite(path, change):
    torch = pytest.importorskip("torch")
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def test_a_pickle_is_read_only_if_it_is_allowed(checkpoint, tmp_path, capsys):
    assert main([str(checkpoint), str(tmp_path / "target")]) == 2
    assert "--allow-pickle" in capsys.readouterr().err
    assert not (tmp_path / "target").exists()


def test_a_checkpoint_gives_its_averaged_weights(checkpoint, tmp_path):
    pytest.importorskip("torch")
    assert main([str(checkpoint), str(tmp_path / "target"), "--allow-pickle"]) == 0
    model = load(tmp_path / "target")
    tokens = golden("mdlm_tiny")["input_ids"]
    expected = golden("mdlm_tiny", "golden_ema.npz")["raw_logits"]
    np.testing.assert_allclose(model.apply(tokens).logits, expected, rtol=0, atol=TOLERANCE)
    assert model.config == load(GOLDEN / "mdlm_tiny").config


def test_a_checkpoint_gives_the_weights_of_its_last_step_if_asked(checkpoint, tmp_path):
    pytest.importorskip("torch")
    target = tmp_path / "target"
    assert main([str(checkpoint), str(target), "--allow-pickle", "--no-ema"]) == 0
    assert_same_bits(load(target).params, load(GOLDEN / "mdlm_tiny").params)


class Stranger:
    """A class that the reader does not know, and whose unpickling would be noticed."""

    def __init__(self):
        self.value = 1

    def __setstate__(self, state):
        raise AssertionError("code from the checkpoint ran")


def test_objects_in_a_checkpoint_are_left_out(checkpoint, tmp_path):
    rewrite(checkpoint, lambda content: content["hyper_parameters"].update(tokenizer=Stranger()))
    assert main([str(checkpoint), str(tmp_path / "target"), "--allow-pickle"]) == 0
    assert load(tmp_path / "target").config.max_length == 32


class Container:
    """Keeps settings as OmegaConf does, whose objects the authors' checkpoints hold."""

    def __init__(self, value):
        if isinstance(value, dict):
            self._content = {name: Container(inner) for name, inner in value.items()}
        else:
            self._val = value


def test_the_settings_in_a_checkpoint_count_in_the_containers_of_the_authors_too(checkpoint):
    saved = Container({"time_conditioning": True, "model": {"length": 48}})
    rewrite(checkpoint, lambda content: content.update(hyper_parameters={"config": saved}))
    cfg, _ = open_lightning(checkpoint, allow_pickle=True)
    assert cfg.time_conditioning and cfg.max_length == 48


SAVED = {
    "backbone": "dit",
    "parameterization": "subs",
    "time_conditioning": False,
    "model": {"length": 48, "n_heads": 4},
}


def spoil(content, change):
    content["ema"]["shadow_params"][3] = change(content["ema"]["shadow_params"][3])


def resized(content, vocab_size):
    """Gives the checkpoint's model this many tokens; random values."""
    torch = pytest.importorskip("torch")

    def one(x):
        return torch.randn((vocab_size, *x.shape[1:])) if x.shape[:1] == (97,) else x

    content["state_dict"] = {name: one(x) for name, x in content["state_dict"].items()}
    content["ema"]["shadow_params"] = [one(x) for x in content["ema"]["shadow_params"]]


def with_settings(checkpoint, vocab_size=97, wrap=lambda x: x, **changes):
    def change(content):
        resized(content, vocab_size)
        content["hyper_parameters"] = {"config": wrap(SAVED | changes)}

    rewrite(checkpoint, change)


def tokenizer(name):
    return {"tokenizer_name_or_path": name}


@pytest.mark.parametrize("kept_by", ["dict", "containers", "omegaconf"])
@pytest.mark.parametrize(
    ("name", "vocab_size", "ids"),
    [
        ("text8", 35, (4, 3, 5)),
        ("bert-base-uncased", 30522, (103, 102, 0)),
        ("google-bert/bert-base-uncased", 30522, (103, 102, 0)),
        ("gpt2", 97, (96, 95, 95)),
        ("openai-community/gpt2-large", 97, (96, 95, 95)),
    ],
)
def test_special_tokens_are_those_of_the_tokenizer_trained_with(
    checkpoint, name, vocab_size, ids, kept_by
):
    wrap = {"dict": lambda x: x, "containers": Container}.get(kept_by)
    wrap = wrap or pytest.importorskip("omegaconf").OmegaConf.create
    with_settings(checkpoint, vocab_size, wrap, data=tokenizer(name))
    cfg, _ = open_lightning(checkpoint, allow_pickle=True)
    assert (cfg.mask_id, cfg.eos_id, cfg.pad_id) == ids
    assert cfg.max_length == 48


@pytest.mark.parametrize(
    ("vocab_size", "changes"),
    [
        (97, {"data": tokenizer("roberta-base")}),
        (97, {"data": tokenizer("text8")}),
        (35, {}),
        (30522, {}),
    ],
)
def test_an_unknown_tokenizer_asks_for_its_ids(checkpoint, vocab_size, changes):
    with_settings(checkpoint, vocab_size, **changes)
    with pytest.raises(InputError, match="--mask-id and --eos-id"):
        open_lightning(checkpoint, allow_pickle=True)
    with pytest.raises(InputError, match="give both"):
        open_lightning(checkpoint, allow_pickle=True, mask_id=7)
    cfg, _ = open_lightning(checkpoint, allow_pickle=True, mask_id=7, eos_id=8)
    assert (cfg.mask_id, cfg.eos_id, cfg.pad_id) == (7, 8, 8)


def test_a_folder_of_another_vocabulary_needs_the_id_of_its_mask():
    values = read_json(GOLDEN / "mdlm_tiny" / "config.json") | {"vocab_size": 30522}
    with pytest.raises(InputError, match="mask_token_id is missing"):
        mdlm.translate_config(values, "float32")
    with pytest.raises(InputError, match="eos_token_id is missing"):
        mdlm.translate_config(values | {"mask_token_id": 103}, "float32")
    assert mdlm.translate_config(
        values | {"mask_token_id": 103, "eos_token_id": 102}, "float32"
    ).subs


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"parameterization": "sedd"}, "parameterization='sedd'"),
        ({"parameterization": "d3pm"}, "parameterization='d3pm'"),
        ({"parameterization": "ar", "backbone": "ar"}, "parameterization='ar'"),
        ({"backbone": "dimamba"}, "backbone='dimamba'"),
        ({"algo": {"name": "bd3lm", "parameterization": "subs"}}, "name='bd3lm'"),
        ({"algo": {"name": "duo", "parameterization": "mean"}}, "parameterization='mean'"),
        ({"time_conditioning": True, "noise": {"type": "cosine"}}, "'cosine'"),
        ({"time_conditioning": "False"}, "time_conditioning='False'"),
        ({"model": {"length": "${data.length}"}}, "model_length="),
    ],
    ids=lambda x: "" if isinstance(x, str) else next(iter(x)),
)
def test_a_model_of_another_kind_is_refused_by_name(checkpoint, changes, words):
    with_settings(checkpoint, **changes)
    with pytest.raises(InputError, match=re.escape(words)):
        open_lightning(checkpoint, allow_pickle=True)


@pytest.mark.parametrize("ema", [True, False])
@pytest.mark.parametrize("wrapper", ["_orig_mod", "module", "_forward_module.module"])
@pytest.mark.parametrize("place", ["outside", "inside", "block"])
def test_a_compiled_or_wrapped_model_gives_the_same_weights(checkpoint, place, wrapper, ema):
    pytest.importorskip("torch")
    _, expected = open_lightning(checkpoint, allow_pickle=True, ema=ema)

    def wrap(name):
        if place == "outside":
            return f"{wrapper}.{name}"
        if place == "inside":
            return name.replace("backbone.", f"backbone.{wrapper}.")
        return re.sub(r"(blocks\.\d+)", rf"\1.{wrapper}", name)

    def change(content):
        content["state_dict"] = {wrap(k): x for k, x in content["state_dict"].items()}

    rewrite(checkpoint, change)
    assert_same_bits(open_lightning(checkpoint, allow_pickle=True, ema=ema)[1], expected)


def test_the_number_of_heads_is_read_where_no_angles_are_kept(checkpoint):
    def change(content):
        del content["state_dict"]["backbone.rotary_emb.inv_freq"]
        content["hyper_parameters"] = {"config": SAVED}

    rewrite(checkpoint, change)
    assert open_lightning(checkpoint, allow_pickle=True)[0].num_heads == 4
    rewrite(checkpoint, lambda content: content.pop("hyper_parameters"))
    with pytest.raises(InputError, match="number of heads"):
        open_lightning(checkpoint, allow_pickle=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content.update(ema=[1]), "--no-ema"),
        (lambda content: content["ema"].update(shadow_params=[1]), "--no-ema"),
        (lambda content: content["ema"].update(shadow_params=True), "--no-ema"),
        (lambda content: spoil(content, lambda x: x.to_sparse()), "dense"),
        (lambda content: spoil(content, lambda x: x.to("meta")), "dense"),
        (lambda content: spoil(content, lambda x: x.int()), "int32"),
        (lambda content: content.pop("ema"), "--no-ema"),
        (lambda content: content["ema"]["shadow_params"].reverse(), "order"),
        (lambda content: content.pop("state_dict"), "state_dict"),
        (lambda content: content["state_dict"].clear(), "backbone"),
    ],
    ids=[
        "odd_ema",
        "odd_shadow",
        "no_list",
        "sparse",
        "meta",
        "integers",
        "no_ema",
        "other_order",
        "no_state",
        "no_tensors",
    ],
)
def test_a_checkpoint_of_another_kind_is_named(checkpoint, tmp_path, capsys, change, words):
    rewrite(checkpoint, change)
    assert main([str(checkpoint), str(tmp_path / "target"), "--allow-pickle"]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not (tmp_path / "target").exists()


def test_a_checkpoint_without_a_file_is_named(tmp_path, capsys):
    assert main([str(tmp_path / "no.ckpt"), str(tmp_path / "target"), "--allow-pickle"]) == 2
    assert "no.ckpt is missing" in capsys.readouterr().err
