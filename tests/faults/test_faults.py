"""What counts faults sees those that there are: some cheap cases of it."""

import json
import random
from functools import partial

import pytest

from dials_jax.errors import InputError
from dials_jax.mirror import MIRROR_STATE
from tests.faults import damage, jobs, moments, targets


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


@pytest.mark.parametrize(
    "said, here, noted, there, problem",
    [
        ("", 12, 8, 8, ""),  # killed: what the copy lacked is computed again
        ("", 12, 8, 12, ""),  # before what it copied last was noted
        ("", 12, 8, 4, "lost what was copied (step 00000008)"),
        ("copied to gs://b/a", 12, 12, 12, ""),
        ("copied to gs://b/a", 12, 8, 8, "lost what was copied (step 00000012)"),
        ("is not copied to its end", 12, 8, 8, ""),
        ("step 12 is saved in", 12, 8, 8, "is saved and not copied"),
    ],
)
def test_what_was_copied_has_to_be_there_when_the_machine_is_lost(
    said, here, noted, there, problem, tmp_path
):
    workdir, seal = tmp_path / "machine", "checkpoints/{:08d}/digest.json".format

    def inject(counting, job, workdir, rng):
        (workdir / seal(here)).parent.mkdir(parents=True)
        (workdir / seal(here)).touch()
        (workdir / MIRROR_STATE).write_text(json.dumps({"sent": {seal(noted): [1, 1]}}))
        (tmp_path / "case.txt").write_text(said)
        return ""

    kept = {f"{there:08d}": f"{there:08d}"}
    job = jobs.Job("training", run=None, result=None, saved=lambda workdir: kept)
    counting = moments.Counting(tmp_path, 1, 0)
    assert moments.lose_machine(inject)(counting, job, workdir, random.Random(0)) == problem
    assert not workdir.exists()
