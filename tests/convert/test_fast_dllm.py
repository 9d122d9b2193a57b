"""A Fast-dLLM v2 converts; [MASK], which its configuration does not name, is the published one."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from dials_jax.convert import fast_dllm
from dials_jax.errors import InputError
from dials_jax.loading import load
from tests.convert.conftest import main

GOLDEN = Path(__file__).parents[1] / "golden" / "fast_dllm_v2_tiny"
VALUES = json.loads((GOLDEN / "config.json").read_text())


def test_the_converted_folder_is_the_published_one(tmp_path, capsys):
    assert main([str(GOLDEN), str(tmp_path / "model")]) == 0
    assert capsys.readouterr().out.endswith(": fast_dllm_qwen, 4 layers, float32\n")
    ours, theirs = load(tmp_path / "model"), load(GOLDEN)
    assert ours.config == theirs.config
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)


def test_the_configuration_means_a_shifted_block_causal_qwen():
    cfg = fast_dllm.translate_config(VALUES, "float32")
    assert (cfg.block_length, cfg.mask_id, cfg.right_shift, cfg.causal) == (16, 190, True, False)
    published = {k: x for k, x in VALUES.items() if k != "mask_token_id"}
    large = fast_dllm.translate_config(published | {"vocab_size": 152064}, "float32")
    assert large.mask_id == 151665


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mask_token_id": None}, "151665, is outside the vocabulary of 200 tokens; add mask_tok"),
        ({"bd_size": None}, "bd_size is missing"),
        ({"use_sliding_window": True}, "use_sliding_window=True is not implemented"),
    ],
)
def test_what_is_not_implemented_is_refused(changes, message, tmp_path):
    folder = shutil.copytree(GOLDEN, tmp_path / "m", ignore=shutil.ignore_patterns("*.npz"))
    (folder / "config.json").write_text(json.dumps(VALUES | changes))
    with pytest.raises(InputError, match=message):
        load(folder)
