"""An iLLaDA converts: logits of the authors' code, a head that is tied or stored."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from dials_jax.convert.hugging_face import translate_checkpoint
from dials_jax.convert.safetensors_reader import open_tensors
from dials_jax.errors import InputError
from dials_jax.loading import load

GOLDEN = Path(__file__).parents[1] / "golden" / "illada_tiny"


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN / "golden.npz")


def test_logits_are_those_of_the_authors_code_with_padding_and_without(golden):
    model, valid = load(GOLDEN), golden["attention_mask"].astype(bool)
    logits = np.asarray(model.apply(golden["input_ids"], valid).logits)
    np.testing.assert_allclose(logits[valid], golden["logits"][valid], rtol=0, atol=2e-4)
    for row, pads in enumerate(golden["left_pads"]):
        alone = golden[f"unpadded_logits_{row}"]
        np.testing.assert_allclose(logits[row, pads:], alone, rtol=0, atol=2e-4)


def test_a_head_is_read_whether_it_is_stored_or_tied():
    values = json.loads((GOLDEN / "config.json").read_text())
    tensors = open_tensors(GOLDEN)
    embedding = tensors["model.embed_tokens.weight"]
    untied = {**tensors, "lm_head.weight": np.array(embedding) + 1}
    tied = {name: x for name, x in tensors.items() if name != "lm_head.weight"}
    for given, expected in ((tied, embedding), (untied, untied["lm_head.weight"])):
        _, params = translate_checkpoint(values, given, GOLDEN)
        np.testing.assert_array_equal(params["head"]["kernel"], np.transpose(expected))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps=1e-05 asks for layer norms"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type='yarn' is not implemented"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not implemented"),
    ],
)
def test_what_is_not_implemented_is_refused(tmp_path, changes, message):
    folder = shutil.copytree(GOLDEN, tmp_path / "m", ignore=shutil.ignore_patterns("*.npz"))
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))
    with pytest.raises(InputError, match=message):
        load(folder)


def test_biases_are_read_where_the_configuration_has_them():
    values = json.loads((GOLDEN / "config.json").read_text())
    biased = values | {"attention_bias": True, "mlp_bias": True}
    with pytest.raises(InputError, match=r"lacks tensor .*bias"):
        translate_checkpoint(biased, dict(open_tensors(GOLDEN)), GOLDEN)
