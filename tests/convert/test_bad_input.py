"""Whatever is wrong with a source is one line that names it, before anything is written."""

import json

import ml_dtypes
import numpy as np
import pytest

from dials_jax.cli.convert import CONVERTED_TYPES
from dials_jax.convert import hugging_face, lightning
from dials_jax.convert.safetensors_reader import open_safetensors
from dials_jax.errors import InputError
from dials_jax.loading import load
from tests.convert.conftest import main

SHARD = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
HEAD = "model.transformer.ff_out.weight"


def error_line(source, target, capsys) -> str:
    """The converter's one line; also checks that loading raises it and nothing is written."""
    assert main([str(source), str(target)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    assert not target.exists() and not list(target.parent.glob(f"{target.name}*"))
    with pytest.raises(InputError) as caught:
        load(source)
    assert "\n" not in str(caught.value)
    return lines[0]


def edit_json(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


# ------------------------------------------------------------------------------- files


def test_a_missing_folder_is_named(tmp_path, capsys):
    assert "nowhere" in error_line(tmp_path / "nowhere", tmp_path / "target", capsys)


def test_a_missing_shard_is_named(sharded, tmp_path, capsys):
    (sharded / SHARD).unlink()
    assert f"{SHARD} is missing" in error_line(sharded, tmp_path / "target", capsys)


@pytest.mark.parametrize("lost", [1, 500_000])
def test_a_truncated_shard_is_named_with_its_sizes(sharded, tmp_path, capsys, lost):
    data = (sharded / SHARD).read_bytes()
    (sharded / SHARD).write_bytes(data[:-lost])
    line = error_line(sharded, tmp_path / "target", capsys)
    assert SHARD in line and str(len(data)) in line and str(len(data) - lost) in line


@pytest.mark.parametrize("content", [b"", b"\x08", b"\xff" * 8, b"\x04" + bytes(7) + b"\xff{}}"])
def test_an_unreadable_header_is_named(sharded, tmp_path, capsys, content):
    (sharded / SHARD).write_bytes(content)
    line = error_line(sharded, tmp_path / "target", capsys)
    assert SHARD in line and "header" in line


def test_a_shard_with_tensors_that_the_index_does_not_list_is_refused(sharded, tmp_path, capsys):
    edit_json(sharded / INDEX, lambda v: v["weight_map"].pop(HEAD))
    assert HEAD in error_line(sharded, tmp_path / "target", capsys)


def test_an_indexed_tensor_that_no_shard_holds_is_named(sharded, tmp_path, capsys):
    edit_json(sharded / INDEX, lambda v: v["weight_map"].update(ghost=SHARD))
    assert "'ghost'" in error_line(sharded, tmp_path / "target", capsys)


def test_an_index_cannot_point_outside_its_folder(sharded, tmp_path, capsys):
    edit_json(sharded / INDEX, lambda v: v["weight_map"].update(ghost="../x.safetensors"))
    assert "../x.safetensors" in error_line(sharded, tmp_path / "target", capsys)


def test_a_folder_without_safetensors_says_what_is_read(sharded, tmp_path, capsys):
    for file in sharded.glob("*.safetensors*"):
        file.unlink()
    assert "only safetensors" in error_line(sharded, tmp_path / "target", capsys)


def test_shards_without_an_index_name_what_is_missing(sharded, tmp_path, capsys):
    (sharded / INDEX).unlink()
    line = error_line(sharded, tmp_path / "target", capsys)
    assert "model-00001-of-00002.safetensors" in line and INDEX in line


@pytest.mark.parametrize("shard", [3, None, [SHARD], {}, "", "..", "a\0b", "a" * 300], ids=repr)
def test_an_index_whose_shards_are_no_names_is_refused(sharded, tmp_path, capsys, shard):
    edit_json(sharded / INDEX, lambda v: v["weight_map"].update(ghost=shard))
    assert "safetensors" in error_line(sharded, tmp_path / "target", capsys)


def entry(dtype="F32", shape=(2,), place=(0, 8)):
    return {"dtype": dtype, "shape": shape, "data_offsets": place}


HEADERS = {
    "overlap": {"a": entry(), "b": entry(place=(4, 12))},
    "hole": {"a": entry(), "b": entry(place=(12, 20))},
    "hole_at_the_start": {"a": entry(place=(4, 12))},
    "bytes_left_over": {"a": entry(), "b": entry(shape=(1,), place=(8, 12))},
    "shape_in_words": {"a": entry(shape="2")},
    "size_in_words": {"a": entry(shape=("2",))},
    "size_with_a_fraction": {"a": entry(shape=(2.0,))},
    "negative_sizes": {"a": entry(shape=(-2, -1))},
    "size_true": {"a": entry(shape=(True, 2))},
    "huge_size": {"a": entry(shape=(2**62, 2**62))},
    "place_with_a_fraction": {"a": entry(place=(0.0, 8.0))},
    "place_backwards": {"a": entry(place=(8, 0))},
    "other_size_than_place": {"a": entry(shape=(3,))},
    "dtype_list": {"a": entry(dtype=["F32"])},
    "dtype_unknown": {"a": entry(dtype="F33")},
    "dtype_of_half_bytes": {"a": entry(dtype="F4", shape=(16,))},
    "no_object": {"a": 3},
    "no_place": {"a": {"dtype": "F32", "shape": [2]}},
    "metadata_list": {"__metadata__": [], "a": entry()},
    "no_header": [],
    "twice": '{"a": %s, "a": %s}' % ((json.dumps(entry()),) * 2),
    "deep": '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "nan": '{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}',
}


@pytest.mark.parametrize("name", HEADERS)
def test_what_the_format_forbids_is_one_line(tmp_path, name):
    header = HEADERS[name]
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    places = [e["data_offsets"] for e in header.values()] if name in ("overlap", "hole") else []
    size = max([8, *(end for _, end in places)]) + 12 * (name == "bytes_left_over")
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    with pytest.raises(InputError) as caught:
        open_safetensors(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


# ------------------------------------------------------------------------------- tensors


def test_an_unknown_tensor_is_named(write_folder, tiny_tensors, tmp_path, capsys):
    extra = np.zeros(32, ml_dtypes.bfloat16)
    source = write_folder(tiny_tensors | {"model.transformer.blocks.0.surprise": extra})
    assert "blocks.0.surprise" in error_line(source, tmp_path / "target", capsys)


@pytest.mark.parametrize("key", [HEAD, "model.transformer.blocks.1.k_proj.bias"])
def test_an_unfilled_parameter_is_named(write_folder, tiny_tensors, tmp_path, capsys, key):
    source = write_folder({k: v for k, v in tiny_tensors.items() if k != key})
    assert key in error_line(source, tmp_path / "target", capsys)


@pytest.mark.parametrize("count", [1, 3])
def test_a_wrong_number_of_layers_is_an_error(write_folder, tmp_path, capsys, count):
    line = error_line(write_folder(n_layers=count), tmp_path / "target", capsys)
    assert f"blocks.{min(count, 2)}." in line


def test_a_wrong_shape_is_named_with_both_shapes(write_folder, tiny_tensors, tmp_path, capsys):
    key = "model.transformer.blocks.0.ff_out.weight"
    source = write_folder(tiny_tensors | {key: np.zeros((48, 32), ml_dtypes.bfloat16)})
    line = error_line(source, tmp_path / "target", capsys)
    assert key in line and "(48, 32)" in line and "(32, 48)" in line


# ------------------------------------------------------------------------------- settings


def test_an_unknown_model_type_names_the_nearest(write_folder, tmp_path, capsys):
    line = error_line(write_folder(model_type="lladas"), tmp_path / "target", capsys)
    assert "'lladas'" in line and "did you mean 'llada'" in line


@pytest.mark.parametrize(
    "option",
    [
        {"alibi": True},
        {"rope": False},
        {"activation_type": "swiglu"},
        {"block_type": "sequential"},
        {"layer_norm_type": "default"},
        {"weight_tying": True},
        {"attention_layer_norm": True},
        {"input_emb_norm": True},
        {"scale_logits": True},
        {"clip_qkv": 8.0},
    ],
    ids=lambda option: next(iter(option)),
)
def test_an_option_that_is_not_implemented_is_named(write_folder, tmp_path, capsys, option):
    (name,) = option
    assert f"{name}=" in error_line(write_folder(**option), tmp_path / "target", capsys)


@pytest.mark.parametrize("name", ["mask_token_id", "rope_theta", "d_model", "mlp_hidden_size"])
@pytest.mark.parametrize("value", ["absent", None, "many"])
def test_a_number_that_is_missing_or_none_is_named(write_folder, tmp_path, capsys, name, value):
    line = error_line(write_folder(**{name: value}), tmp_path / "target", capsys)
    assert name in line


def test_a_mask_outside_the_vocabulary_is_refused(write_folder, tmp_path, capsys):
    assert "mask_id=41" in error_line(write_folder(mask_token_id=41), tmp_path / "target", capsys)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_experts": 64, "architectures": ["XMoE"]}, "a mixture of experts (XMoE)"),
        ({"model_type": "llada2_moe", "num_experts": 8}, "a mixture of experts"),
        ({"model_type": "sdar_moe"}, "'sdar_moe') is not supported; these are: llada, illada"),
        ({"model_type": "diffusion_gemma"}, "'diffusion_gemma' is not supported; these are: llada"),
        ({"architectures": ["LLaDAForImages"]}, "LLaDAForImages is not supported"),
        (
            {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
            "(LlamaForCausalLM) is not supported",
        ),
        ({"model_type": "mamba", "architectures": ["M"]}, "'mamba' (M) is not supported; these"),
        ({"model_type": ["llada"]}, "['llada']"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised weights"),
        ({"activation_type": "absent"}, "activation_type is missing"),
        ({"include_bias": "false"}, "include_bias='false' must be true or false"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false'"),
        ({"rope_theta": float("inf")}, "rope_theta=inf"),
        ({"rope_theta": 10**400}, "rope_theta=1000"),
        ({"n_layers": True}, "n_layers=True"),
        ({"d_model": 0}, "d_model=0 must be a positive multiple"),
        ({"vocab_size": 2**40, "embedding_size": None}, "too large"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_the_true_cause_is_named(write_folder, tmp_path, capsys, changes, words):
    assert words in error_line(write_folder(**changes), tmp_path / "target", capsys)


# ------------------------------------------------------------------------------- targets


def test_an_existing_target_is_left_alone(sharded, tmp_path, capsys):
    (tmp_path / "target").mkdir()
    assert main([str(sharded), str(tmp_path / "target")]) == 2
    assert "exists" in capsys.readouterr().err
    assert not list((tmp_path / "target").iterdir())


def test_what_is_wrong_with_a_target_is_said_before_a_checkpoint_is_read(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(lightning, "open_lightning", lambda *args, **kwargs: pytest.fail("read"))
    (tmp_path / "file").touch()
    for target, words in ((tmp_path, "exists"), (tmp_path / "file" / "x", "file is no folder")):
        assert main(["last.ckpt", str(target), "--allow-pickle"]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("source", ["sharded", "router.safetensors"])
@pytest.mark.parametrize("option", [["--no-ema"], ["--ema"], ["--allow-pickle"], ["--eos-id", "1"]])
def test_options_of_a_checkpoint_are_refused_for_others(source, option, tmp_path, capsys):
    assert main([source, str(tmp_path / "target"), *option]) == 2
    line = f"error: {option[0]} is for a .ckpt, and {source} is none; leave it out\n"
    assert capsys.readouterr().err == line


def test_a_number_format_is_refused_for_a_router(tmp_path, capsys):
    assert main(["r.safetensors", str(tmp_path / "target"), "--dtype", "bfloat16"]) == 2
    assert "--dtype is for models" in capsys.readouterr().err


def test_an_unknown_option_is_one_line(capsys):
    assert main(["source", "target", "--alow-pickle"]) == 2
    assert capsys.readouterr().err == (
        "error: '--alow-pickle' is no option of dials convert; did you mean '--allow-pickle'?\n"
    )


def test_a_folder_that_is_converted_already_is_named(arithmetic_model, tmp_path, capsys):
    assert main([str(arithmetic_model / "model"), str(tmp_path / "target")]) == 2
    assert "is a model folder of this library already" in capsys.readouterr().err
    workdir = tmp_path / "workdir"
    workdir.mkdir()
    (workdir / "config.json").write_text("{}")
    (workdir / "model").symlink_to(arithmetic_model / "model")
    assert main([str(workdir), str(tmp_path / "target")]) == 2
    assert "the folder of a training, whose model is of this" in capsys.readouterr().err


def test_help_says_what_the_command_needs(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "SRC" in text and "--dtype" in text
    assert tuple(hugging_face.MODEL_TYPES) == CONVERTED_TYPES and all(
        kind in text for kind in CONVERTED_TYPES
    )
