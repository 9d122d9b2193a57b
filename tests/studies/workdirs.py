"""Sizes of the tiny studies, and how tests read what a study leaves."""

import json

from dials_jax.files import read_json

LENGTH, STEPS = 12, 8


def records_of(workdir):
    """Lines of runs.jsonl, measured times and the digests of lines apart."""
    records = [json.loads(line) for line in (workdir / "runs.jsonl").read_text().splitlines()]
    for record in records:
        assert record.pop("seconds", 1) > 0 and len(record.pop("digest")) == 8
    return records


def results_of(workdir):
    return read_json(workdir / "results.json")
