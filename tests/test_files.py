"""JSON of this library's own tells when it is damaged."""

import contextlib
import json

import pytest

from dials_jax.errors import InputError
from dials_jax.files import read_json, write_json

VALUES = {"steps": 12, "rates": [0.5, 1e-7], "model": {"causal": False, "name": "ä"}}


def test_no_flipped_bit_is_used_in_silence(tmp_path):
    path = tmp_path / "config.json"
    write_json(path, VALUES, digest=True)
    whole, refused = path.read_bytes(), 0
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with contextlib.suppress(InputError):
            found = read_json(path)  # the name of the digest may have changed
            assert {name: found.get(name) for name in VALUES} == VALUES
            continue
        refused += 1
    assert refused > 0.8 * 8 * len(whole)


def test_what_was_written_comes_back_and_an_edit_is_named_with_its_remedy(tmp_path):
    path = tmp_path / "config.json"
    write_json(path, VALUES, digest=True)
    assert read_json(path) == VALUES
    edited = json.loads(path.read_text()) | {"steps": 13}
    path.write_text(json.dumps(edited))
    with pytest.raises(InputError, match=r'config.json is damaged or was edited.*remove its "dig'):
        read_json(path)
    del edited["digest"]  # also how earlier versions left it
    path.write_text(json.dumps(edited))
    assert read_json(path) == VALUES | {"steps": 13}


def test_the_order_of_names_and_spaces_may_change(tmp_path):
    path = tmp_path / "config.json"
    write_json(path, VALUES, digest=True)
    stored = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(stored.items())), indent=4))
    assert read_json(path) == VALUES
