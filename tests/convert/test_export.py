"""Export is the inverse of conversion: the tensors of every published family, bit by bit."""

import dataclasses
import json
import shutil
import weakref
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from dials_jax.cli.export import export_command
from dials_jax.convert import publish
from dials_jax.convert.hugging_face import MODEL_TYPES, convert_folder, open_hugging_face
from dials_jax.convert.safetensors_reader import open_tensors
from dials_jax.convert.safetensors_writer import write_shards
from dials_jax.data.chat import read_chat_templates
from dials_jax.data.tokenizer import load_tokenizer
from dials_jax.errors import InputError
from dials_jax.export import export_model
from dials_jax.files import read_json
from dials_jax.loading import load
from dials_jax.models import families
from dials_jax.models.model import Model
from dials_jax.stored import MARK
from tests.conftest import small_config
from tests.convert.conftest import write_safetensors
from tests.convert.test_convert import assert_same_bits

GOLDEN = Path(__file__).parents[1] / "golden"
FAMILIES = (
    "llada_tiny", "llada_instruct_tiny", "illada_tiny", "dream_tiny", "sdar_tiny",
    "fast_dllm_v2_tiny", "qwen2_tiny",
    "mdlm_tiny", "gpt2_tiny",
)  # fmt: skip


def named(folder):
    """All tensors; MDLM's golden ones lack the prefix of the published class."""
    return {name.removeprefix("backbone."): x for name, x in open_tensors(folder).items()}


def assert_same_tensors(folder, source):
    a, b = named(folder), named(source)
    assert a.keys() == b.keys()
    for name, x in a.items():
        assert (x.dtype, x.shape) == (b[name].dtype, b[name].shape), name
        assert x.tobytes() == b[name].tobytes(), name


# ------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_comes_out_as_it_was_published(name, tmp_path):
    source, folder = GOLDEN / name, export_model(GOLDEN / name, tmp_path / "out")
    assert_same_tensors(folder, source)
    (cfg, params), (old, expected) = open_hugging_face(folder), open_hugging_face(source)
    assert cfg == old
    assert_same_bits(params, expected)
    theirs, ours = read_json(source / "config.json"), read_json(folder / "config.json")
    assert ours["model_type"] == theirs["model_type"] and ours["torch_dtype"] == "float32"
    assert ours["architectures"] == theirs.get("architectures", ["MDLM"])


def test_every_kind_of_checkpoint_has_been_exported():
    kinds = {read_json(GOLDEN / name / "config.json")["model_type"] for name in FAMILIES}
    assert kinds == MODEL_TYPES.keys()


def test_a_converted_bfloat16_model_comes_out_in_bfloat16_and_in_files_of_a_size(
    write_folder, tmp_path
):
    source = write_folder()
    convert_folder(source, tmp_path / "converted")
    folder = export_model(tmp_path / "converted", tmp_path / "out", max_shard_size="6KB")
    assert_same_tensors(folder, source)
    assert all(x.dtype == ml_dtypes.bfloat16 for x in named(folder).values())
    assert_same_bits(open_hugging_face(folder)[1], open_hugging_face(source)[1])
    index = read_json(folder / "model.safetensors.index.json")
    shards = sorted(folder.glob("*.safetensors"))
    sizes = [sum(x.nbytes for x in load_shard(shard).values()) for shard in shards]
    assert [file.name for file in shards] == sorted(set(index["weight_map"].values()))
    assert len(shards) > 2 and max(sizes) <= 6000 and sum(sizes) == index["metadata"]["total_size"]


def load_shard(file):
    """By the package, which the writer does not use."""
    with safe_open(file, framework="numpy") as opened:
        assert opened.metadata() == {"format": "pt"}
        return {name: opened.get_tensor(name) for name in opened.keys()}


def test_another_dtype_is_that_of_a_cast(tmp_path):
    folder = export_model(GOLDEN / "mdlm_tiny", tmp_path / "out", "bfloat16")
    found, expected = named(folder), named(GOLDEN / "mdlm_tiny")
    angles = "rotary_emb.inv_freq"  # what is computed keeps its dtype
    for name, x in found.items():
        dtype = np.float32 if name == angles else ml_dtypes.bfloat16
        np.testing.assert_array_equal(x, expected[name].astype(dtype), strict=True)
    assert read_json(folder / "config.json")["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("layout", ["stacked", "fused"])
def test_a_model_in_memory_in_any_layout(layout, tmp_path):
    model = load(GOLDEN / "gpt2_tiny", layout=layout)
    assert_same_tensors(export_model(model, tmp_path / "out"), GOLDEN / "gpt2_tiny")


def test_a_head_is_left_out_only_if_it_is_the_embedding(tmp_path):
    cfg, params = open_hugging_face(GOLDEN / "illada_tiny")
    params["head"]["kernel"] = np.nextafter(params["head"]["kernel"], 2)
    folder = export_model(Model(cfg, params), tmp_path / "out")
    assert read_json(folder / "config.json")["tie_word_embeddings"] is False
    assert_same_bits(open_hugging_face(folder)[1]["head"], jax.tree.map(np.asarray, params["head"]))
    tied = export_model(GOLDEN / "illada_tiny", tmp_path / "tied")
    assert read_json(tied / "config.json")["tie_word_embeddings"] is True
    assert "lm_head.weight" not in named(tied)


# ------------------------------------------------------------------------------- from scratch


def test_all_chat_templates_come_along_there_and_back(tmp_path):
    source, converted, back = tmp_path / "source", tmp_path / "converted", tmp_path / "back"
    shutil.copytree(GOLDEN / "llada_tiny", source)
    (source / "chat_templates").mkdir()
    (source / "chat_templates" / "tool.jinja").write_text("{{ messages }}")
    (source / "chat_template.jinja").write_text("{{ bos_token }}")
    templates = read_chat_templates(source)
    assert templates.keys() == {"default", "tool"}
    convert_folder(source, converted)
    export_model(converted, back)
    assert read_chat_templates(converted) == read_chat_templates(back) == templates


def test_a_model_that_was_trained_here_takes_its_tokenizer_along(arithmetic_model, tmp_path):
    folder = export_model(arithmetic_model, tmp_path / "out")
    loaded, model = load(folder), load(arithmetic_model)
    assert loaded.fingerprint == model.fingerprint and loaded.config == model.config
    assert load_tokenizer(folder).encode("+12,3=") == load_tokenizer(arithmetic_model).encode(
        "+12,3="
    )
    settings = read_json(folder / "tokenizer_config.json")
    assert (settings["mask_token"], settings["pad_token"]) == ("[MASK]", "[PAD]")
    ids = {"eos_token_id": 1, "pad_token_id": 0, "mask_token_id": 18}
    assert read_json(folder / "generation_config.json") == {"_from_model_config": True, **ids}


@pytest.mark.parametrize(
    "cfg",
    [
        families.llada_8b(),
        families.llada_8b(eot_id=None, num_kv_heads=8, qkv_bias=True),
        families.llada_small(2, 64, 300, 299, 1, 0, eot_id=7),
        families.dream_7b(),
        families.qwen2_5_7b(head_dim=64),
        families.mdlm(time_conditioning=True),
        families.mdlm_small(2, 64, 30, 3, 2, 1),
        families.gpt2_small(2, 64, 300, 1, 0, mask_id=299),
    ],
    ids=lambda cfg: f"{cfg.model_type}-{cfg.num_layers}-{cfg.eot_id}",
)
def test_presets_can_be_said(cfg):
    values = publish.published_config(cfg, cfg.dtype)
    again = publish.family_of(cfg).module.translate_config(values, cfg.dtype)
    assert dataclasses.replace(again, eot_id=cfg.eot_id) == cfg
    json.dumps(values)


@pytest.mark.parametrize(
    "cfg, message",
    [
        (small_config(norm="layer"), "of llada cannot say norm='layer' ('rms' is what"),
        (small_config(causal=True), "of llada cannot say causal=True"),
        (small_config(head_dim=8, num_heads=2, num_kv_heads=2), "cannot say head_dim=8 (16 is"),
        (families.mdlm(d_ff=64), "of mdlm cannot say d_ff=64 (3072 is what it would mean)"),
        (families.dream_7b(max_length=4096), "of Dream cannot say max_length=4096 (2048 is"),
        (families.dream_7b(head_dim=64), "of Dream cannot say head_dim=64"),
        (
            families.gpt2(num_heads=5, num_kv_heads=5),
            "gpt2 has no such model (config.json: n_embd=768",
        ),
        (small_config(model_type="mine"), "model type 'mine' has no published layout; these"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_a_layout_cannot_say_is_refused_in_a_line(cfg, message):
    with pytest.raises(InputError) as caught:
        publish.published_config(cfg, "float32")
    assert message in str(caught.value) and "\n" not in str(caught.value)


# ------------------------------------------------------------------------------- files


def test_a_tensor_is_gone_before_the_next_one_is_made(tmp_path):
    shapes = {str(i): jax.ShapeDtypeStruct((8, i + 1), np.float32) for i in range(5)}
    alive = []

    def tensors():
        for name, x in shapes.items():
            made = np.full(x.shape, float(name), np.float32)
            assert not any(ref() is not None for ref in alive)
            alive.append(weakref.ref(made))
            yield name, made
            del made

    write_shards(tmp_path, shapes, tensors(), shard_bytes=100)
    for name, x in open_tensors(tmp_path).items():
        np.testing.assert_array_equal(x, np.full(shapes[name].shape, float(name), np.float32))


def test_a_stopped_export_leaves_no_folder_and_the_next_one_succeeds(tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("dials_jax.export.write_json", stop)  # when the weights are written
        export_model(GOLDEN / "gpt2_tiny", tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["out.unfinished"]
    assert (tmp_path / "out.unfinished" / MARK).exists()
    with pytest.raises(InputError, match="holds no model"):
        load(tmp_path / "out.unfinished")
    export_model(GOLDEN / "gpt2_tiny", tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["out", "out.unfinished"])
def test_what_another_program_made_stays(name, tmp_path):
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match=r"out exists|was not left by a save"):
        export_model(GOLDEN / "gpt2_tiny", tmp_path / "out")
    assert (tmp_path / name / "thesis.txt").read_text() == "years of work"


def test_damage_of_the_model_is_found_and_nothing_looks_whole(arithmetic_model, tmp_path):
    shutil.copytree(arithmetic_model / "model", tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "params" / "head")
    with pytest.raises(InputError, match="params/head is missing"):
        export_model(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------- the command


def test_the_command_says_what_it_wrote(tmp_path, capsys):
    export_command([str(GOLDEN / "mdlm_tiny"), "--out", str(tmp_path / "out"), "--dtype=bfloat16"])
    shown = capsys.readouterr().out
    assert shown.startswith(f"{tmp_path / 'out'}: config.json, generation_config.json, model.safe")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--max-shard-size", "5"], "max_shard_size=5 is no size; give one as 5GB or 500MB"),
        (["--max-shard-size", "0GB"], "max_shard_size=0GB is no size"),
        (["--dtype", "float8"], "--dtype: invalid choice: 'float8'"),
        (["--dtpe", "float32"], "did you mean '--dtype'?"),
    ],
)
def test_wrong_options_are_a_line(options, message, tmp_path):
    with pytest.raises(InputError) as caught:
        export_command(["nowhere", "--out", str(tmp_path / "out"), *options])
    assert message in str(caught.value)


def test_half_a_checkpoint_is_refused(write_folder, tiny_tensors, tmp_path):
    source = write_folder()
    tiny_tensors.popitem()
    write_safetensors(source / "model.safetensors", tiny_tensors)
    with pytest.raises(InputError, match="lacks tensor"):
        export_model(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [source]
