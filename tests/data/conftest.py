"""A character tokenizer, model configs that belong to such, and a writer of JSON lines."""

import json
import string

import pytest

from dials_jax.config import ModelConfig
from dials_jax.data.tokenizer import character_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return character_tokenizer(string.ascii_letters + string.digits + " \n.,:?[]=+>$#-")


@pytest.fixture(scope="session")
def model_of():
    """Makes a small model config that belongs to a character tokenizer."""

    def make(tokenizer):
        mask_id, eos_id, pad_id = map(tokenizer.token_to_id, ("[MASK]", "[EOS]", "[PAD]"))
        return ModelConfig(
            vocab_size=tokenizer.vocab_size,
            d_model=8,
            num_layers=1,
            num_heads=1,
            num_kv_heads=1,
            head_dim=8,
            d_ff=8,
            max_length=64,
            rope_theta=1e4,
            norm_eps=1e-5,
            mask_id=mask_id,
            eos_id=eos_id,
            pad_id=pad_id,
        )

    return make


@pytest.fixture(scope="session")
def model_config(model_of, tokenizer):
    return model_of(tokenizer)


@pytest.fixture
def write_jsonl(tmp_path):
    def write(records, name="records.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
        return str(path)

    return write
