"""`dials generate` writes answers as they come and continues; `dials chat` keeps a conversation."""

import json
import re

import pytest

from dials_jax import answer_file, text
from dials_jax.caching.plain import PrefixCache
from dials_jax.cli.chat import chat_command, talk
from dials_jax.cli.generate import generate_command
from dials_jax.data.tokenizer import character_tokenizer
from dials_jax.errors import InputError
from dials_jax.evaluation import harness
from dials_jax.files import read_json
from dials_jax.loading import load
from dials_jax.skipping.policies import Static
from dials_jax.text import TextJob, generate_text
from tests.conftest import save_arithmetic_model
from tests.test_text import TEMPLATE, render_plainly

PROMPTS = ["+12,34=", "s7,5=", "r123,45=", "+1,2="]


@pytest.fixture(scope="module")
def model(arithmetic_model):
    return str(arithmetic_model / "model")


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return str(file)


@pytest.fixture
def run(model, prompts, tmp_path):
    """Runs the command; returns its lines by number, without their times."""
    out = tmp_path / "out" / "answers.jsonl"

    def generate(*options):
        arguments = ["--file", prompts, "--max-new-tokens", "4", "--block-length", "2"]
        generate_command([model, *arguments, "--out", str(out), *options])
        lines = list(map(json.loads, out.read_text().splitlines()))
        for line in lines:
            assert line.pop("seconds") > 0 and line.pop("digest")
        return {line["number"]: line for line in lines}

    generate.out = out
    return generate


def test_stop_strings_are_settings_of_the_answers(run, model):
    plain = generate_text(load(model), PROMPTS, max_new_tokens=4, block_length=2)
    stop = plain[0].text[1]
    lines = run("--stop", stop, "--stop", "xyz")
    for number, answer in enumerate(plain):
        assert lines[number]["text"] == answer.text.split(stop)[0]
        assert lines[number]["ended"] or stop not in answer.text
    assert read_json(run.out.with_name("answers.settings.json"))["stop"] == sorted([stop, "xyz"])
    with pytest.raises(InputError, match=r"has answers under other settings \(stop\)"):
        run()


def test_answers_in_8_bits_are_those_of_the_model_and_are_not_mixed_with_others(run, model):
    settings = {"max_new_tokens": 4, "block_length": 2}
    expected = generate_text(load(model, weights="int8"), PROMPTS, **settings)
    lines = run("--weights", "int8")
    assert [lines[i]["text"] for i in range(4)] == [answer.text for answer in expected]
    with pytest.raises(InputError, match="has answers under other settings"):
        run()


def test_a_line_is_what_generate_text_returns(run, model, capsys):
    lines = run("--static", "1", "--log-probs")
    settings = {"max_new_tokens": 4, "block_length": 2, "log_probs": True}
    expected = generate_text(load(model), PROMPTS, policy=Static((1,)), **settings)
    assert lines.keys() == set(range(4))
    identity = read_json(run.out.with_name("answers.settings.json"))
    for number, answer in enumerate(expected):
        line = lines[number]
        assert (line["prompt"], line["text"]) == (PROMPTS[number], answer.text)
        assert (line["passes"], line["layers_run"]) == (answer.passes, 0.75)
        assert line["tokens"] == answer.tokens.tolist()
        assert line["log_probs"] == pytest.approx(answer.log_probs.tolist(), abs=2e-4)
        assert line["settings"] == answer_file.settings_digest(identity)
    shown = capsys.readouterr()
    assert shown.out == f"4 answers are in {run.out}\n"
    ahead = "4 of 4 prompts to answer, of 5 to 8 tokens: up to 4 new ones each, in at most 4 passes"
    assert ahead in shown.err
    assert re.search(r"4 answers: .* tokens/s .*, 4 passes each, 75.0% of the layers\n$", shown.err)


@pytest.mark.parametrize("shifted", [False, True], ids=["as SDAR", "as Fast-dLLM v2"])
def test_a_block_causal_model_answers(prompts, tmp_path, shifted, monkeypatch):
    monkeypatch.setattr(text, "render_chat", render_plainly)
    save_arithmetic_model(tmp_path, block_length=4, right_shift=shifted)
    (tmp_path / "model" / "chat_template.jinja").write_text(TEMPLATE)
    out = tmp_path / "answers.jsonl"
    settings = ["--max-new-tokens", "6", "--threshold", "0.2", "--cache", "dual", "--chat"]
    generate_command([str(tmp_path / "model"), "--file", prompts, "--out", str(out), *settings])
    lines = {line["number"]: line for line in map(json.loads, out.read_text().splitlines())}
    [alone] = generate_text(
        load(tmp_path / "model"), PROMPTS[1], max_new_tokens=6, threshold=0.2, chat=True,
        cache=PrefixCache(),
    )  # fmt: skip
    assert (lines[1]["text"], lines[1]["passes"]) == (alone.text, alone.passes)
    assert lines.keys() == set(range(4)) and all(line["num_tokens"] <= 6 for line in lines.values())


def test_a_killed_run_continues(run, monkeypatch):
    whole, asked = run(), []
    batches = TextJob.batches
    monkeypatch.setattr(
        TextJob, "batches", lambda job, rest: asked.append(list(rest)) or batches(job, rest)
    )
    text = run.out.read_text()
    first, second, *_ = text.splitlines(keepends=True)
    run.out.write_text(first + second[:20])  # killed in the middle of a line
    assert run() == whole
    assert asked == [[i for i in range(4) if i != json.loads(first)["number"]]]
    assert run() == whole and asked[1] == []
    run.out.write_text(text.replace(json.loads(first)["text"], "x" * 9, 1))  # damaged
    assert run() == whole and len(asked[2]) == 1


def test_other_settings_and_other_prompts_never_reuse_answers(run, prompts, tmp_path):
    before = run()
    for options, name in [
        (("--temperature", "1"), "sampler.temperature"),
        (("--static", "0", "--seed", "3"), "policy.*seed"),
        (("--log-probs", "--max-new-tokens", "3"), "max_new_tokens.*log_probs"),
    ]:
        with pytest.raises(InputError, match=rf"answers under other settings .*{name}.*--out$"):
            run(*options)
    with open(prompts, "a") as file:
        file.write('{"prompt": "+3,3="}\n')
    assert run().keys() == before.keys() | {4}  # more prompts only add lines
    file = tmp_path / "prompts.jsonl"
    file.write_text(file.read_text().replace("s7,5=", "s7,6="))
    with pytest.raises(InputError, match=r"answers 's7,5=' as prompt 1, which is another now"):
        run()
    run.out.with_name("answers.settings.json").unlink()
    with pytest.raises(InputError, match=r"was not made by a run of this folder"):
        run()


def test_a_text_that_went_through_the_template_is_another_prompt(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "render_chat", render_plainly)
    folder, file = save_arithmetic_model(tmp_path) / "model", tmp_path / "prompts.jsonl"
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    message = {"role": "user", "content": "1"}
    file.write_text(json.dumps({"prompt": "1"}) + "\n" + json.dumps({"messages": [message]}))
    out = tmp_path / "answers.jsonl"
    arguments = [str(folder), "--file", str(file), "--max-new-tokens", "4", "--out", str(out)]
    generate_command(arguments)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert {line["number"]: line["chat"] for line in lines} == {0: False, 1: True}
    with pytest.raises(InputError, match="answers prompt 0 without the chat template, unlike now"):
        generate_command([*arguments, "--chat"])


def test_what_is_wrong_with_options_is_said_before_a_model_is_loaded(tmp_path):
    for options, message in (
        (["--out", str(tmp_path)], "is a folder; name a file in it"),
        (["--out", f"{__file__}/x.jsonl"], "is no folder that can be written to"),
        (["--log-probs"], "--log-probs are kept in the file of --out"),
        (["--batch-size", "0"], "--batch-size=0 must be positive"),
        (["--stop", ""], "--stop has an empty text"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            generate_command(["nowhere", "--prompt", "1", *options])


def test_another_tokenizer_is_seen_before_weights_are_read(model, tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "load", lambda *args: pytest.fail("weights were read"))
    character_tokenizer("ab").save(tmp_path)
    with pytest.raises(InputError, match="the tokenizer has no token"):
        generate_command([model, "--prompt", "1", "--tokenizer", str(tmp_path)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "1" * 100], "a prompt has 100 tokens, and the model 32 positions"),
        (["--prompt", "1", "--max-new-tokens", "40"], "with 40 new ones"),
        (["--prompt", "?"], "the tokenizer cannot encode"),
    ],
)
def test_a_prompt_that_does_not_fit_is_seen_before_weights_are_read(
    model, monkeypatch, options, message
):
    monkeypatch.setattr(harness, "load", lambda *args: pytest.fail("weights were read"))
    with pytest.raises(InputError, match=message):
        generate_command([model, *options])


def test_without_a_file_answers_are_printed(model, capsys):
    generate_command([model, "--prompt", "+1,2=", "--max-new-tokens", "4"])
    [answer] = generate_text(load(model), "+1,2=", max_new_tokens=4)
    assert capsys.readouterr().out == f"{answer.text}\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), 'there are no prompts; give --prompt "..." or --file prompts.jsonl'),
        (("--promt", "1"), "'--promt' is no option of dials generate; did you mean '--prompt'?"),
        (("--prompt", "1", "--bogus"), "no option of dials generate; --help lists all options"),
        (("--prompt", "1", "--static", "x"), "give layers from 0, as 7,9"),
        (("--prompt", "1", "--cache", "dul"), "cache 'dul' is not known; did you mean 'dual'?"),
        (("--prompt", "1", "--chat"), "has no chat template"),
        (
            ("--prompt", "1", "--top-k", "3"),
            "the sampler of this model (llada), has no",
        ),
        (("--prompt", "1", "--sampler", "Dreem(8)"), "'Dreem' is not known; did you mean 'Dream'?"),
        (
            ("--prompt", "1", "--sampler", "Dream(8)", "--steps", "3"),
            "--sampler has all of its settings; leave out --steps",
        ),
        (("--file", "gs://bucket/x.jsonl"), "--file=gs://bucket/x.jsonl is no local path"),
        (("--prompt", "1", "--out", "gs://x/y"), "--out=gs://x/y is no local path"),
        (("--prompt", "1" * 40), "a prompt has 40 tokens, and the model 32 positions"),
        (("--prompt", "1", "--random", "9"), "cannot skip as many of 4 layers"),
    ],
)
def test_what_is_wrong_is_one_line(model, options, message):
    with pytest.raises(InputError, match=re.escape(message)) as error:
        generate_command([model, *options])
    assert "\n" not in str(error.value)


def test_a_name_on_the_hub_is_told_from_a_folder():
    with pytest.raises(InputError, match="hf download GSAI-ML/LLaDA-8B-Base --local"):
        generate_command(["GSAI-ML/LLaDA-8B-Base", "--prompt", "1"])


def test_a_line_without_a_prompt_is_named(model, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "1"}\n{"promt": "2"}\n')
    with pytest.raises(InputError, match=r"p\.jsonl:2: give either"):
        generate_command([model, "--file", str(tmp_path / "p.jsonl")])


# ---------------------------------------------------------------------------------------- chat


def says(monkeypatch, *lines):
    given = iter(lines)

    def read(prompt):
        try:
            return next(given)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)


def test_a_conversation_has_a_history(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(text, "render_chat", render_plainly)
    folder = save_arithmetic_model(tmp_path) / "model"
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    says(monkeypatch, "1", "2", "/reset", "1", "/what", "")
    chat_command([str(folder), "--max-new-tokens", "4"])
    chatting = load(folder)
    [one] = generate_text(chatting, "1,=", max_new_tokens=4)
    [two] = generate_text(chatting, f"1,{one.text},2,=", max_new_tokens=4)
    assert capsys.readouterr().out.splitlines() == [one.text, two.text, one.text]


def test_what_cannot_be_answered_is_forgotten(monkeypatch, capsys):
    seen = []

    def answer(messages):
        seen.append([message["content"] for message in messages])
        raise InputError("prompt 0 is too long")

    says(monkeypatch, "1", "2", "/exit", "3")
    talk(answer, [{"role": "system", "content": "s"}])
    assert seen == [["s", "1"], ["s", "2"]]
    assert "error: prompt 0 is too long (/reset begins" in capsys.readouterr().err


def test_a_model_without_a_template_does_not_chat(model):
    with pytest.raises(InputError, match="has no chat template, so its model is no chat model"):
        chat_command([model])
