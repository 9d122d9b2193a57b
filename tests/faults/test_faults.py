"""What counts faults sees those that there are: some cheap cases of it."""

import random
from functools import partial

import pytest

from dials_jax.errors import InputError
from tests.faults import damage, jobs, targets


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    base = tmp_path_factory.mktemp("faults") / "base"
    jobs.make_text(base)
    jobs.prepare(base, base / "corpus")
    return base


@pytest.mark.parametrize("how", damage.DAMAGES)
@pytest.mark.parametrize("file", ["parts/train-00002.npy", "manifest.json", "files.json"])
def test_a_damaged_corpus_is_read_right_or_refused_by_name(base, how, file, tmp_path):
    use, rng = partial(targets.rows_of_corpus, base), random.Random(0)
    expected = use(base / "corpus")
    for _ in range(3):
        copy = damage.copy_of(base / "corpus", tmp_path / "copy")
        use(copy)  # which notes that it is whole
        damage.DAMAGES[how](copy / file, rng)
        kind, said = damage.outcome(use, copy, copy / file, expected)
        assert kind in damage.GOOD, said


def test_the_judge_tells_what_is_wrong(tmp_path):
    file = tmp_path / "config.json"

    def judged(use):
        return damage.outcome(use, tmp_path, file, {"value": 1})[0]

    def fail(error):
        raise error

    assert judged(lambda copy: {"value": 1}) == damage.EQUAL
    assert judged(lambda copy: {"value": 2}) == damage.SILENT
    assert judged(lambda copy: fail(InputError(f"{file} is damaged"))) == damage.REFUSED
    assert judged(lambda copy: fail(InputError("something is damaged"))) == damage.UNNAMED
    assert judged(lambda copy: fail(KeyError("value"))) == damage.TRACEBACK
