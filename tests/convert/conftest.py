"""Small checkpoints as their authors would publish them."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from dials_jax.cli.convert import convert_command
from dials_jax.commands import run_command

KINDS = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float64": "F64",
    "int64": "I64",
    "uint8": "U8",
    "bool": "BOOL",
}
TINY = {
    "model_type": "llada",
    "d_model": 32,
    "n_heads": 4,
    "n_kv_heads": 2,
    "n_layers": 2,
    "mlp_hidden_size": 48,
    "vocab_size": 40,
    "embedding_size": 41,
    "max_sequence_length": 64,
    "rope": True,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "activation_type": "silu",
    "block_type": "llama",
    "layer_norm_type": "rms",
    "weight_tying": False,
    "include_bias": True,
    "include_qkv_bias": True,
    "mask_token_id": 40,
    "eos_token_id": 1,
    "pad_token_id": None,
}


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, x in tensors.items():
        end = offset + x.nbytes
        kind = KINDS[x.dtype.name]
        header[name] = {"dtype": kind, "shape": list(x.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    data = b"".join(x.tobytes() for x in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def torch_shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor of `TINY`, biases included, as torch shapes it."""
    shapes = {"wte.weight": (41, 32), "ln_f.weight": (32,)}
    linear = {"ff_out": (41, 32)}
    for i in range(2):
        block = f"blocks.{i}."
        shapes |= {f"{block}attn_norm.weight": (32,), f"{block}ff_norm.weight": (32,)}
        linear |= {f"{block}q_proj": (32, 32), f"{block}attn_out": (32, 32)}
        linear |= {f"{block}k_proj": (16, 32), f"{block}v_proj": (16, 32)}
        linear |= {f"{block}ff_proj": (48, 32), f"{block}up_proj": (48, 32)}
        linear |= {f"{block}ff_out": (32, 48)}
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return {f"model.transformer.{name}": shape for name, shape in shapes.items()}


@pytest.fixture
def tiny_tensors():
    """Random tensors of `TINY` in bfloat16."""
    rng = np.random.default_rng(0)
    shapes = torch_shapes().items()
    return {n: rng.normal(size=s).astype(ml_dtypes.bfloat16) for n, s in shapes}


@pytest.fixture
def write_folder(tmp_path, tiny_tensors):
    """Writes `TINY`, with changes, as one safetensors file; returns the folder."""

    def write(tensors=None, **changes):
        folder = tmp_path / "source"
        folder.mkdir()
        values = {k: v for k, v in (TINY | changes).items() if v != "absent"}
        (folder / "config.json").write_text(json.dumps(values))
        tensors = tiny_tensors if tensors is None else tensors
        write_safetensors(folder / "model.safetensors", tensors)
        return folder

    return write


@pytest.fixture
def sharded(tmp_path):
    """A copy of the golden LLaDA, in two shards with an index, for tests to damage."""
    golden = Path(__file__).parents[1] / "golden" / "llada_tiny"
    return shutil.copytree(golden, tmp_path / "sharded", ignore=shutil.ignore_patterns("*.npz"))


def main(arguments):
    """Runs `dials convert`; returns its exit status."""
    try:
        run_command(lambda: convert_command(arguments))
    except SystemExit as stop:
        return stop.code or 0
    return 0
