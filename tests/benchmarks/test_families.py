"""The three families: the page of made-up results whose claims are known, and a tiny run."""

import argparse
import dataclasses
import json
import lzma
import os
import signal
import string
import time

import chex
import jax
import numpy as np
import pytest

from benchmarks import command, families, families_page
from benchmarks.families_claims import (
    Results,
    claim_findings,
    correlations,
    find,
    kept_likelihood,
    retained,
)
from benchmarks.families_page import page
from dials_jax.config import RepresentationStudy, TextData
from dials_jax.data.tokenizer import character_tokenizer
from dials_jax.evaluation import sweep as sweep_module
from dials_jax.files import read_json, write_json
from dials_jax.loading import load
from dials_jax.studies.claims import judge
from dials_jax.training.run import step_folder

LAST = {"native": 6, "causal": 6, "continued": 3}  # steps of the tiny trainings
FIGURES = ("profiles", "training", "skipping", "change", "retention")
LAYERS, PROMPTS, TEXTS = 6, 12, 10
EARLY_HIGH = np.array([0.3, 0.97, 0.95, 0.8, 0.75, 0.7])  # cosines of a native model's layers
FLAT = np.array([0.3, 0.85, 0.85, 0.86, 0.86, 0.85])
SMOOTH, RECENT = np.linspace(0.95, 0.8, LAYERS + 1), np.full(LAYERS + 1, 0.4)


def results(continued_like=FLAT):
    """Two sizes, two seeds: native models redundant early, causal ones recent, similarity right."""
    rng = np.random.default_rng(0)
    rows = {"trainings": [], "losses": [], "profiles": []}
    shapes = {
        "native": (EARLY_HIGH, SMOOTH),
        "causal": (FLAT, RECENT),
        "continued": (continued_like, RECENT),
    }

    changes = {
        "change_layers": [2, 5], "distances": list(range(-10, 11)),
        "change": [[0.1] * 21, [0.2] * 21], "change_near": [0.1, 0.2], "recency_ratio": [2.5, None],
    }  # fmt: skip

    def noisy(mean, number):
        return (mean + rng.normal(0, 0.005, (number, len(mean)))).tolist()

    for size, seed, family in (
        (size, seed, family) for size in ("6x8", "6x16") for seed in (0, 1) for family in shapes
    ):
        layer, token = shapes[family]
        where = {"size": size, "seed": seed, "family": family}
        rows["trainings"].append(
            where | {"parameters": 1000, "tokens": 640, "own_tokens": 320, "flops": 2.0,
                     "seconds": 1.5, "steps": 6, "log": [[6, 1.0]]}
        )  # fmt: skip
        full = rng.normal(4, 0.3, TEXTS)
        routed = {"routed λ=1": {"skips": [0.0] * LAYERS, "nats": 4.0}}
        routed["routed λ=1 fitted to 0.75"] = {"skips": (layer - 0.1).tolist(), "nats": 4.1}
        rows["losses"].append(
            where | {"full": full.tolist(),
                     "without": [(full + 1 - c).tolist() for c in layer],
                     "chosen": [
                         {"k": k, "adjacent": adjacent, "layers": list(range(k)),
                          "nats": (full + k * (0.1 if adjacent else 0.2)).tolist()}
                         for adjacent in (False, True) for k in (1, 2)
                         if k == 1 or adjacent or seed == 0  # the other seed finds no two
                     ],
                     "routed": routed if family == "native" else {}}
        )  # fmt: skip
        for step in (0, 6):
            rows["profiles"].append(
                where | {"step": step, "label": f"{family}-{step}",
                         "layer": noisy(layer if step else FLAT, PROMPTS),
                         "token": noisy(token, PROMPTS), "end": noisy(token, PROMPTS),
                         "prompt_layer": noisy(layer, PROMPTS),
                         "change_layers": [], **(changes if family != "causal" else {})}
            )  # fmt: skip
    machine = {"device": "a GPU", "date": "today", "jax": "1", "command": "python -m it"}
    settings = {"length": 16, "prompts": PROMPTS, "study_steps": 4, "items": TEXTS, "samples": 4}
    return {"machine": machine, "settings": settings, "plan": [], **rows}


def test_an_interval_covers_sequences_and_seeds():
    rng = np.random.default_rng(0)
    same = rng.normal(1, 0.1, 40)
    alike, apart = find("", [same, same]), find("", [same - 0.3, same + 0.3])
    assert alike.value == apart.value and alike.by_seed == (same.mean(), same.mean())
    assert alike.sign == 1 and apart.sign == 0 and apart.high - apart.low > 1
    assert find("", [-same]).sign == -1  # a single seed: over sequences alone
    assert find("", [np.append(same, np.nan)]).value == pytest.approx(same.mean())
    none = find("", [np.full(3, np.nan)])
    assert none.sign == 0 and str(none).startswith("no sequence has this number")


CLAIMS = (
    "early layers of native diffusion are redundant",
    "causal models have a recency bias",
    "the continued model keeps the causal structure",
)


def test_claims_are_found_and_their_opposites_too():
    found = claim_findings(Results(results()), "6x8")
    assert tuple(found) == CLAIMS
    assert [judge(numbers) for numbers in found.values()] == ["supported"] * 3
    found = claim_findings(Results(results(continued_like=EARLY_HIGH)), "6x8")[CLAIMS[2]]
    assert [one.sign for one in found] == [-1, 1, 1] and len(found[0].by_seed) == 2


def test_masks_that_are_alike_support_no_recency_bias():
    """What counts is the last model call, where masks do not."""
    rows = results()
    for row in rows["profiles"]:
        if row["family"] == "native":
            row["end"] = (np.array(row["end"]) - 0.7).tolist()
    signs = [one.sign for one in claim_findings(Results(rows), "6x8")[CLAIMS[1]]]
    assert signs == [1, 1, -1, 1]


def test_similarity_predicts_what_it_was_made_from():
    found = list(correlations(Results(results()), "6x16", "native"))
    assert len(found) == 2 * 4  # seeds, and pairs of what is compared
    assert all(one.value > 0.8 and one.low <= one.value <= one.high for _, _, one in found)
    assert len(list(correlations(Results(results()), "6x16", "causal"))) == 2 * 2


def test_what_chosen_layers_cost():
    found = retained(Results(results()), "6x16", "causal")
    assert [list(kinds) for kinds in found.values()] == [[1], [1, 2]]  # where all seeds have them
    assert found[True][2].layers == [[0, 1], [0, 1]]
    assert found[True][2].cost.value == pytest.approx(0.2)
    assert kept_likelihood(found[False][1].cost) == pytest.approx([np.exp(-0.2)] * 3)
    spread_out = dataclasses.replace(found[True][1].cost, low=0.0, high=0.5)
    assert kept_likelihood(spread_out)[1:] == pytest.approx((np.exp(-0.5), 1.0))


def test_the_page_says_what_the_numbers_say(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "keep_programs", lambda: None)
    (tmp_path / "families.json").write_text(json.dumps(results()))
    assert families_page.main([str(tmp_path / "families.json"), str(tmp_path / "page.md")]) == 0
    text = (tmp_path / "page.md").read_text()
    for claim in CLAIMS:
        assert f"That {claim} is supported." in text
    assert "![cosines by depth; a line is a seed](page/profiles.png)" in text
    for name in FIGURES:
        assert (tmp_path / "page" / f"{name}.png").exists()
        assert (tmp_path / "page" / f"{name}.pdf").exists()
    assert "| 6x8 | native | allowed | 2 | 0, 1; 0, 1 | +0.2000 [" in text
    assert "| not allowed | 2 |" not in text
    assert "nan" not in text and "| 6x8 | native | 0 |" in text
    assert "| 6x16 | continued | 5 | 0.2000 ± 0.0000 | not seen |" in text
    (tmp_path / "other.json").write_text("{}")
    assert families_page.main([str(tmp_path / "other.json"), str(tmp_path / "page.md")]) == 2
    assert "is not of benchmarks.families" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, message",
    [
        (["--sizes", "3x32", "4x32"], "--steps has 1 numbers for 2 --sizes; give one per size"),
        (["--sizes", "small"], "--sizes 'small' is no size; give layers x width, such as 12x640"),
        (["--sizes", "2x32"], "--sizes 2x32: early and late layers need at least 3 of them"),
        (["--steps", "1"], "1 steps cannot be halved; train longer"),
        (["--kept", "1"], "must be shares of a training, in [0, 1)"),
    ],
)
def test_wrong_options_are_one_line(changes, message, arguments, capsys):
    assert families.main([*arguments, *changes]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    """A tiny experiment on made-up text."""
    monkeypatch.setattr(command, "keep_programs", lambda: None)
    rng = np.random.default_rng(0)
    character_tokenizer(string.ascii_lowercase + " ").save(tmp_path / "tokenizer")
    for name, number in (("train", 60), ("validation", 40)):
        lines = [
            json.dumps({"text": "".join(rng.choice(list("abcde "), 40))}) for _ in range(number)
        ]
        with lzma.open(tmp_path / f"{name}.jsonl.xz", "wt") as file:
            file.write("\n".join(lines))
    return [
        *("--text", str(tmp_path), "--tokenizer", str(tmp_path / "tokenizer")),
        *("--workdir", str(tmp_path / "run"), "--out", str(tmp_path / "families.json")),
        *("--sizes", "3x32", "--steps", "6", "--rates", "1"),
        *("--seeds", "0", "--kept", "0", "--batch", "4", "--length", "16", "--prompts", "2"),
        *("--study-steps", "2", "--items", "4", "--samples", "2", "--router-steps", "2"),
        *("--layout", "stacked", "--execution", "0.6"),
    ]


def test_what_is_kept_is_found_again_though_settings_were_added(tmp_path):
    text = TextData(paths=("text.jsonl",), length=8, prompt_length=4)
    cfg = RepresentationStudy(models=(("model", "runs/model"),), data=text, gen_length=4)
    file = tmp_path / "found.json"
    assert families.once(file, cfg, lambda: 1) == families.once(file, cfg, lambda: 2) == 1
    stored = read_json(file)
    del stored["settings"]["batch_size"]  # as before there was this setting
    write_json(file, stored)
    assert families.once(file, cfg, lambda: 2) == 1
    assert families.once(file, dataclasses.replace(cfg, batch_size=3), lambda: 2) == 2
    write_json(file, {"settings": {"unknown": 1}, "found": 3})
    assert families.once(file, cfg, lambda: 4) == 4


def test_the_time_ends_what_is_running(monkeypatch, capsys):
    """A sweep or a study has stored its batches; the same command goes on with them."""

    def leave(status):
        raise SystemExit(status)

    monkeypatch.setattr(os, "_exit", leave)
    runner = families.Runner(argparse.Namespace(stop_after=0.002, families=()))
    with pytest.raises(SystemExit, match="1"), runner.while_there_is_time():
        time.sleep(20)
    assert "the same command goes on" in capsys.readouterr().out
    with pytest.raises(families.OutOfTime), runner.while_there_is_time():
        raise AssertionError("nothing begins without time")
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    with families.Runner(argparse.Namespace(stop_after=None, families=())).while_there_is_time():
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_the_whole_experiment_goes_on_where_it_was_stopped(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep_module, "write_report", lambda *_: [])  # its figures take long
    monkeypatch.setattr(sweep_module, "format_table", lambda rows: "")
    assert families.main([*arguments, "--stop-after", "1e-4"]) == 1
    for part in (["native"], ["continued", "causal"]):
        assert families.main([*arguments, "--families", *part]) == 0
        assert not (tmp_path / "families.json").exists()
    for name in ("train", "sweep", "run_representation"):
        monkeypatch.setattr(families, name, None)  # nothing is done again
    assert families.main(arguments) == 0
    found = read_json(tmp_path / "families.json")

    unit = tmp_path / "run" / "3x32-0"
    assert {row["tokens"] for row in found["trainings"]} == {6 * 4 * 16}
    assert [row["own_tokens"] for row in found["trainings"]] == [384, 384, 192]
    half, first = (
        jax.device_get(load(step_folder(unit / family, step), layout="stacked").params)
        for family, step in (("causal", 3), ("continued", 0))
    )
    chex.assert_trees_all_equal(half, first)
    assert load(unit / "continued").config.right_shift

    losses = {row["family"]: row for row in found["losses"]}
    assert np.shape(losses["causal"]["without"]) == (3, 4)
    assert len(losses["native"]["routed"]) == 2 and not losses["continued"]["routed"]
    profiles = [(row["family"], row["step"]) for row in found["profiles"]]
    assert profiles == [(f, s) for f, last in LAST.items() for s in (0, last)]
    assert np.shape(found["profiles"][1]["layer"]) == (2, 3)

    chosen = {(run["k"], run["adjacent"]) for run in losses["causal"]["chosen"]}
    assert chosen == {(1, False), (1, True)}
    text = page(Results(found), dict.fromkeys(FIGURES, tmp_path / "x.png"), tmp_path)
    assert "| 3x32 | native | 0 |" in text
