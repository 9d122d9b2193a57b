"""A replay shows what the generation did: as data of its page, and in a terminal."""

import dataclasses
import html
import io
import json
import re

import numpy as np
import pytest

import dials_jax as dj
from dials_jax.cli.watch import watch_command
from dials_jax.errors import InputError
from dials_jax.models.model import Model
from dials_jax.reporting import replay_terminal
from dials_jax.reporting.replay import page_data, written_by
from dials_jax.sampling import generate as generating
from dials_jax.skipping.policies import StaticGates
from dials_jax.skipping.routed import Routed
from dials_jax.text import draw_keys
from dials_jax.watching import FULL_DEPTH, replay, shown_value
from tests.conftest import amplify, init_params, random_routers, silence

PROMPTS = ["+12,34=", "s7="]
SETTINGS = {"max_new_tokens": 8, "block_length": 4}
MASK_ID = 18


@pytest.fixture(scope="module")
def model(arithmetic_model):
    """The arithmetic task's tokenizer, and weights that choose different tokens and layers."""
    model = dj.load(arithmetic_model / "model")
    return Model(model.config, silence(amplify(model.params, 8), MASK_ID), path=model.path)


@pytest.fixture(scope="module")
def routed(model):
    return Routed(random_routers(model.config), 0.3)


@pytest.fixture(scope="module")
def found(model, routed):
    return replay(model, PROMPTS, policy=routed, **SETTINGS)


def data_of(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])


def check_page(data, replayed):
    """The canvas that follows from the page's writes, and its layers, are the generation's."""
    for scene, shown in zip(replayed.scenes, data["scenes"], strict=True):
        for run, calls in zip(scene.runs, (x["calls"] for x in shown["runs"]), strict=True):
            canvas = np.where(scene.blank, -1, scene.canvas)
            for tokens, call in zip(run.tokens, calls, strict=True):
                for at, token, probability in call["writes"]:
                    canvas[at] = token
                    assert probability is None or 0 <= probability <= 1
                np.testing.assert_array_equal(canvas[canvas >= 0], tokens[canvas >= 0])
                assert sum(count for count, _ in call["depths"]) == len(canvas)
            end = scene.start + run.num_tokens
            np.testing.assert_array_equal(canvas[:end], run.tokens[-1, :end])
            layers = [call["layers"] for call in calls]
            assert np.mean(layers) == pytest.approx(run.layers_run)


def test_runs_are_those_of_the_generation(found, model, routed):
    text = dj.load_tokenizer(model.path)
    ids = [text.encode(prompt) for prompt in PROMPTS]
    sampler = dj.Confidence(8, 4, stop_at_eos=True)
    for place, policy in ((0, None), (1, routed)):
        out = dj.generate(model, ids, sampler=sampler, policy=policy, key=draw_keys(0, ids))
        for b, scene in enumerate(found.scenes):
            run = scene.runs[place]
            assert run.tokens[-1].tolist() == [*ids[b], *out.tokens[b, -8:]]
            assert run.nfe == out.passes[b] and run.num_tokens == out.num_tokens[b]
            assert run.layers_run == pytest.approx(out.layers_run[b])
            totals = scene.totals(run)
            assert totals["tokens_per_pass"] == pytest.approx(out.tokens_per_pass[b])
            assert totals["equal"] == (scene.answer(run) == scene.answer(scene.runs[0]))
    full, skipped = found.scenes[0].runs
    assert full.layers_run == 1 > skipped.layers_run
    assert found.scenes[0].totals(full)["flops_share"] == 1
    assert found.block_length == 4 and found.shift == 0
    assert repr(found).startswith("Replay(2 prompts)\n  full depth: ")


def test_the_page_shows_the_same(found, tmp_path):
    page = found.save(tmp_path / "new" / "replay.html").read_text("utf-8")
    data = data_of(page)
    assert data == json.loads(json.dumps(page_data(found)))
    check_page(data, found)
    assert [run["name"] for run in data["scenes"][0]["runs"]] == [FULL_DEPTH, "routed"]
    assert dict(data["settings"])["policy"].startswith("Routed(")
    addresses = set(re.findall(r"https?://[^\"\s]+", page))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, which nothing fetches
    assert not re.search(r"\b(src|href|import|fetch)\b ?[=(]", page)


def test_texts_cannot_leave_their_place(found):
    nasty = "</script><script>alert(1)</script><!--"
    bad = dataclasses.replace(found, pieces={t: nasty for t in found.pieces})
    page = bad.to_html()
    assert page.count("<script") == found.to_html().count("<script") == 2
    assert set(data_of(page)["pieces"].values()) == {nasty}
    frame = bad._repr_html_()
    [inner] = re.findall(r'srcdoc="([^"]*)"', frame)
    assert html.unescape(inner) == page and frame.count("<") == 2


def test_nothing_left_out_is_one_run_and_one_program(model, traced_once):
    traced_once(generating, "generate_program")
    alone = replay(model, PROMPTS, **SETTINGS)
    assert [run.name for run in alone.scenes[0].runs] == [FULL_DEPTH]
    assert alone.scenes[0].totals(alone.scenes[0].runs[0])["flops_share"] == pytest.approx(1)


def test_tokens_that_leave_early_and_what_follows_an_end(model):
    cache = dj.EarlySkip((1.0, 0.5), (0.0, 0.3), prompt_every=8, block_every=4)
    early = replay(model, PROMPTS[:1], cache=cache, max_new_tokens=8, compare=False)
    check_page(page_data(early), early)
    [run] = early.scenes[0].runs
    assert run.name == "EarlySkip" and set(np.unique(run.depth)) == {0, 3, 4}
    computed = (run.depth[..., None] > np.arange(4)).sum(axis=1)
    np.testing.assert_array_equal(computed, run.tokens_run)
    assert shown_value(StaticGates(np.ones(2, bool))).startswith("StaticGates(gates=")
    assert shown_value(cache).startswith("EarlySkip(proportions=(1.0, 0.5), depths=(0.0, 0.3), ")


def test_a_light_model_takes_some_steps(model):
    cfg = dataclasses.replace(model.config, num_layers=2)
    models = {"H": model, "L": Model(cfg, amplify(init_params(cfg, 9), 8))}
    schedule = dj.Schedule.parse("L1,H2,L1")
    turns = replay(models, PROMPTS[1:], schedule=schedule, sampler=dj.Ancestral(8, 4))
    full, run = turns.scenes[0].runs
    assert run.name == "schedule L1,H2,L1" and full.letters == ""
    light = np.array(list(run.letters)) == "L"
    assert (run.layers.sum(axis=1)[light] == 2).all() and (run.layers[~light] == 1).all()
    check_page(page_data(turns), turns)
    assert {"model H", "model L", "schedule", "sampler"} <= turns.settings.keys()


def test_masks_in_a_text_are_filled(model):
    texts = ["+1[MASK],3[MASK]=4", "[MASK]="]
    filled = replay(model, texts, policy=dj.Static((1,)), compare=False)
    check_page(page_data(filled), filled)
    assert [int(scene.blank.sum()) for scene in filled.scenes] == [2, 1]
    assert [scene.runs[0].nfe for scene in filled.scenes] == [2, 1]
    assert filled.scenes[1].start == 0
    assert filled.block_length == len(filled.scenes[0].canvas)
    with pytest.raises(InputError, match=r"prompt 1 has \[MASK\] and prompt 0 none"):
        replay(model, ["+1=", texts[0]])
    for settings, message in (
        ({"cache": dj.DualCache()}, r"cache has no meaning where \[MASK\] is filled; leave it out"),
        ({"treshold": 0.9}, r"treshold has no meaning .* did you mean 'threshold'\?"),
        ({"stop": ";"}, "stop has no meaning in a replay"),
        ({"sampler": dj.Confidence(1), "threshold": 0.9}, "sampler= has its own threshold; set it"),
    ):
        with pytest.raises(InputError, match=message):
            replay(model, texts, **settings)


@pytest.mark.parametrize(
    ("canvas", "tokens", "log_probs", "written"),
    [
        # the second call says an end of text, and what follows it is filled
        ([9, 9, 9], [[5, 9, 9], [5, 1, 1]], [[-1, np.nan, np.nan], [-1, -2, np.nan]],
         [[1, 0, 0], [0, 1, 1]]),
        # a causal model writes the token that stood for the blank
        ([1, 1], [[1, 1], [1, 1]], [[-1, np.nan], [-1, -2]], [[1, 0], [0, 1]]),
    ],
)  # fmt: skip
def test_what_a_call_wrote(canvas, tokens, log_probs, written):
    found = written_by(np.array(tokens), np.array(log_probs, np.float32), np.array(canvas))
    np.testing.assert_array_equal(found, np.array(written, bool))


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_draws_every_call_over_the_one_before(found, monkeypatch):
    monkeypatch.setattr(replay_terminal.shutil, "get_terminal_size", lambda: (30, 40))
    stream = Terminal()
    replay_terminal.play(dataclasses.replace(found, scenes=found.scenes[:1]), stream, delay=0.0)
    frames = re.split(r"\x1b\[\d+F\x1b\[J", stream.getvalue())
    assert len(frames) == 1 + max(run.nfe for run in found.scenes[0].runs)
    plain = [re.sub(r"\x1b\[[\d;]*m", "", frame) for frame in frames]
    assert all(len(line) <= 30 for frame in plain for line in frame.splitlines())
    assert "░░░░" in plain[0] and "░" not in plain[-1]
    answers = [found.text(found.scenes[0].answer(run)) for run in found.scenes[0].runs]
    assert all(answer in plain[-1] for answer in answers)


def test_elsewhere_there_is_a_line_for_each_block(found):
    stream = io.StringIO()
    replay_terminal.play(found, stream)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "> +12,34=" and lines[1].startswith("full depth: call ")
    blocks = sum(-(-run.num_tokens // 4) for scene in found.scenes for run in scene.runs)
    assert len(lines) == 2 + blocks
    control = dataclasses.replace(found, pieces={t: "\x1b[2J\n" for t in found.pieces})
    replay_terminal.play(control, stream := io.StringIO())
    assert "\x1b" not in stream.getvalue() and "�[2J⏎" in stream.getvalue()


def test_the_command(arithmetic_model, tmp_path, capsys):
    folder, out = str(arithmetic_model / "model"), tmp_path / "replay.html"
    options = ["--static", "1", "--max-new-tokens", "4", "--out", str(out), "--delay", "0"]
    watch_command([folder, "--prompt", "+1,2=", *options])
    shown = capsys.readouterr().out
    assert "\nstatic: call 4 of 4, layers run 75.0%, " in shown
    assert shown.endswith(f"the page is {out}\n")
    assert len(data_of(out.read_text("utf-8"))["scenes"][0]["runs"]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), 'there are no prompts; give --prompt "..."'),
        (("--prompt", "1", "--delay", "-1"), "--delay=-1 must lie in 0 to 3600 seconds"),
        (("--prompt", "1", "--delay", "inf"), "--delay=inf must lie in 0 to 3600 seconds"),
        (("--prompt", "1", "--out", f"{__file__}/x.html"), "is no folder that can be written to"),
        (("--prompt", "1", "--light", "x"), "--light is the model L of --schedule; give both"),
        (("--prompt", "1", "--light", "x", "--schedule", "H"), "schedule 'H': 'H' is not"),
        (("--prompt", "1", "--out", "/"), "--out=/ is a folder; name a file in it, as replay.html"),
        (("--prompt", "1", "--stop", ";"), "--stop cuts a text, and a replay shows every call"),
        (("--prompt", "1", "--routr", "x"), "did you mean '--router'"),
    ],
)
def test_bad_input_is_one_line(options, message):
    with pytest.raises(InputError) as error:
        watch_command(["nowhere", *options])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_page_that_cannot_be_written_is_named(found, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"the page .*file/replay.html cannot be written: "):
        found.save(tmp_path / "file" / "replay.html")
