"""Nothing that a model's folder brings along is run. Pickles: see tests/convert/test_mdlm.py."""

import json
import shutil
from pathlib import Path

import pytest

from dials_jax.convert.hugging_face import open_hugging_face
from dials_jax.data.chat import render_chat
from dials_jax.data.tokenizer import character_tokenizer, load_tokenizer
from dials_jax.errors import InputError

GOLDEN = Path(__file__).parent / "golden" / "llada_tiny"


@pytest.fixture
def folder(tmp_path):
    """A published folder that asks for its own code, which would leave the file `ran`."""
    shutil.copytree(GOLDEN, tmp_path / "model")
    character_tokenizer("abc").save(tmp_path / "model")
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own:\n    pass\n"
    (tmp_path / "model" / "own.py").write_text(code)
    auto = {name: "own.Own" for name in ("AutoConfig", "AutoModel", "AutoModelForCausalLM")}
    edit(tmp_path / "model/config.json", auto_map=auto)
    text = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(text))
    return tmp_path / "model"


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_code_beside_weights_or_a_tokenizer_is_not_run(folder):
    open_hugging_face(folder)
    try:
        load_tokenizer(folder)
    except InputError as error:  # that it cannot be read without its code
        assert len(str(error).splitlines()) == 1
    assert not (folder.parent / "ran").exists()


def test_a_chat_template_cannot_reach_python(tmp_path):
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(InputError):
        render_chat(
            escape, [{"role": "user", "content": "a"}], character_tokenizer("abc"), tmp_path
        )
