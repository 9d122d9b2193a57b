"""Configurations of models that version 0.1 stored are those of the same models."""

import jax
import pytest

from dials_jax import trees
from dials_jax.config import ModelConfig, from_dict, to_dict
from dials_jax.models import families, transformer

IDS = {"mask_id": 15, "eos_id": 0, "pad_id": 0}
SHAPE = {
    "num_layers": 1, "d_model": 8, "num_heads": 2, "num_kv_heads": 1, "head_dim": 4, "d_ff": 16,
    "max_length": 8, "vocab_size": 16,
}  # fmt: skip
BIASES = {"qkv_bias": True, "o_bias": True, "mlp_bias": True, "head_bias": True}
MODELS = {
    "llada": families.llada_small(1, 8, 16, **IDS, head_dim=4),
    "llada_with_biases": families.llada_small(1, 8, 16, **IDS, head_dim=4, **BIASES),
    "dream": families.dream_7b(**SHAPE, **IDS, eot_id=None),
    "qwen2": families.qwen2_5_7b(**SHAPE, **(IDS | {"mask_id": None})),
    "mdlm": families.mdlm_small(1, 8, 16, **IDS, head_dim=4),
    "gpt2": families.gpt2_small(1, 8, 16, eos_id=0, pad_id=0, head_dim=4),
}
# What version 0.1 wrote of their biases, and the parameters that it made.
STORED = {
    "llada": {"qkv_bias": False, "bias": False, "o_bias": None, "head_bias": None},
    "llada_with_biases": {"qkv_bias": True, "bias": True, "o_bias": None, "head_bias": None},
    "dream": {"qkv_bias": True, "bias": False, "o_bias": None, "head_bias": None},
    "qwen2": {"qkv_bias": True, "bias": False, "o_bias": None, "head_bias": None},
    "mdlm": {"qkv_bias": False, "bias": True, "o_bias": False, "head_bias": None},
    "gpt2": {"qkv_bias": True, "bias": True, "o_bias": None, "head_bias": False},
}
QKV = {"attention/q_bias", "attention/k_bias", "attention/v_bias"}
MADE = {
    "llada": set(),
    "llada_with_biases": QKV | {
        "attention/o_bias", "mlp/gate_bias", "mlp/up_bias", "mlp/down_bias", "head/bias",
    },
    "dream": QKV,
    "qwen2": QKV,
    "mdlm": {"mlp/up_bias", "mlp/down_bias", "head/bias"},
    "gpt2": QKV | {"attention/o_bias", "mlp/up_bias", "mlp/down_bias"},
}  # fmt: skip
ELSEWHERE = ("norm", "modulation", "time/")


@pytest.mark.parametrize("name", MODELS)
def test_the_biases_are_those_that_version_0_1_meant(name):
    values = {n: x for n, x in to_dict(MODELS[name]).items() if n not in BIASES}
    cfg = from_dict(ModelConfig, values | STORED[name])
    assert cfg == MODELS[name]
    params = jax.eval_shape(lambda: transformer.init(cfg, jax.random.key(0)))
    made = {n.removeprefix("layers/") for n, _ in trees.named_leaves(params) if "bias" in n}
    assert {n for n in made if not n.startswith(ELSEWHERE) and "norm" not in n} == MADE[name]
    assert from_dict(ModelConfig, to_dict(cfg)) == cfg
