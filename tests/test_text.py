"""Text in, text out: prompts of mixed lengths, conversations, cuts, settings that always fit."""

import dataclasses
import json
import re

import numpy as np
import pytest

import dials_jax as dj
from dials_jax import text
from dials_jax.data.chat import read_chat_templates
from dials_jax.data.tokenizer import load_tokenizer
from dials_jax.errors import InputError
from dials_jax.loading import load
from dials_jax.models.model import Model
from dials_jax.skipping.routed import Routed
from dials_jax.text import generate_text, text_job
from dials_jax.text_sampler import fitting_length, text_sampler
from tests.conftest import amplify, random_routers, save_arithmetic_model, silence, small_config

PROMPTS = ["+12,34=", "s7,5=", "r123,45=", "+1,2="]
TEMPLATE = "{% for m in messages %}{{ m['content'] }},{% endfor %}="


@pytest.fixture(scope="module")
def model(arithmetic_model):
    """The small model, with weights so large that its answers differ. It never says [MASK]."""
    found = load(arithmetic_model / "model")
    return Model(found.config, silence(amplify(found.params, 8), 18), path=found.path)


@pytest.fixture(scope="module")
def policy(model):
    return Routed(random_routers(model.config), 0.3)


def render_plainly(template, messages, tokenizer, folder):
    assert template == TEMPLATE
    return "".join(f"{message['content']}," for message in messages) + "="


def test_answers_are_those_of_every_prompt_alone(model, policy):
    settings = {"max_new_tokens": 6, "policy": policy, "log_probs": True, "block_length": 4}
    together = generate_text(model, PROMPTS, batch_size=2, **settings)
    assert len({answer.text for answer in together}) > 1
    for prompt, answer in list(zip(PROMPTS, together, strict=True))[1:3]:
        [alone] = generate_text(model, prompt, **settings)
        assert (answer.text, answer.passes) == (alone.text, alone.passes)
        assert answer.layers_run == pytest.approx(alone.layers_run) and 0 < answer.layers_run < 1
        np.testing.assert_array_equal(answer.tokens, alone.tokens)
        np.testing.assert_allclose(answer.log_probs, alone.log_probs, atol=2e-4)
        assert len(answer.tokens) == len(answer.log_probs) <= 6


def test_mask_in_a_prompt_is_refused_before_anything_is_generated(model):
    mask = load_tokenizer(model.path).backend.id_to_token(model.config.mask_id)
    with pytest.raises(InputError, match=r"prompt 1 contains \[MASK\]"):
        text_job(model, [PROMPTS[0], f"1{mask}2="])


def test_an_answer_is_cut_before_the_end_of_text(model):
    [plain] = generate_text(model, PROMPTS[0], max_new_tokens=6)
    ending = dataclasses.replace(model.config, eos_id=int(plain.tokens[3]))
    [cut] = generate_text(
        Model(ending, model.params, path=model.path), PROMPTS[0], max_new_tokens=6, log_probs=True
    )
    first = plain.tokens.tolist().index(ending.eos_id)
    np.testing.assert_array_equal(cut.tokens, plain.tokens[:first])
    assert cut.text == load_tokenizer(model.path).decode(cut.tokens)
    assert cut.ended and not plain.ended and np.isfinite(cut.log_probs).all()


def test_a_stop_string_cuts_the_text_and_saves_steps(model):
    settings = {"max_new_tokens": 6, "block_length": 2, "log_probs": True}
    plain = generate_text(model, PROMPTS[:2], **settings)
    stop = plain[0].text[1:3]
    [first, _] = cut = generate_text(model, PROMPTS[:2], stop=["no such text", stop], **settings)
    assert [answer.text for answer in cut] == [answer.text.split(stop)[0] for answer in plain]
    place = plain[0].text.index(stop)
    assert first.ended and first.text == plain[0].text[:place]
    np.testing.assert_array_equal(first.tokens, plain[0].tokens[:place])  # a token is a character
    np.testing.assert_allclose(first.log_probs, plain[0].log_probs[:place], atol=2e-4)
    blocks = (place + len(stop) + 1) // 2  # and one more if that block ends with half a stop string
    assert first.passes in (2 * blocks, 2 * blocks + 2) and first.passes < plain[0].passes == 6
    [late] = generate_text(  # nothing ends early here, and the text is the same
        model, PROMPTS[0], stop=stop, sampler=dj.Confidence(6, 2, 6, stop_at_eos=False)
    )
    assert (late.text, late.passes) == (first.text, 6)
    with pytest.raises(InputError, match=r"stop=\('',\) has an empty text; remove it"):
        generate_text(model, PROMPTS[0], stop="")


def test_repeated_prompts_are_several_draws_and_what_remains_is_what_it_was(model):
    settings = {"max_new_tokens": 4, "temperature": 3.0, "seed": 5}
    job = text_job(model, [PROMPTS[0], *PROMPTS, PROMPTS[0]], **settings)
    whole = dict(job.answers())
    assert len({whole[i].text for i in (0, 1, 5)}) > 1
    rest = dict(job.answers(remaining=[5]))
    assert rest.keys() == {5} and rest[5].text == whole[5].text


@pytest.mark.parametrize("plainly", [True, False])
def test_a_conversation_is_read_through_the_template(plainly, tmp_path, monkeypatch):
    if plainly:  # what jinja2 makes of the template
        monkeypatch.setattr(text, "render_chat", render_plainly)
    else:
        pytest.importorskip("jinja2")
    folder = save_arithmetic_model(tmp_path) / "model"
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    chatting = load(folder)
    talk = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    job = text_job(chatting, [talk, "1"], max_new_tokens=4)
    encode = job.reader.tokenizer.encode
    assert job.prompts == [encode("1,2,="), encode("1")] and job.template == TEMPLATE
    assert text_job(chatting, ["1"], chat=True, max_new_tokens=4).prompts == [encode("1,=")]
    assert text_job(chatting, ["1"], max_new_tokens=4).template is None
    assert text_job(chatting, "1,2", max_new_tokens=4).prompts == [encode("1,2")]


@pytest.mark.parametrize("template", ["{{ 1 + 'a' }}", "{{ x.y }}", "{{ 1 // 0 }}", "{% for %}"])
def test_whatever_a_template_raises_is_one_line(template, tmp_path):
    pytest.importorskip("jinja2")
    folder = save_arithmetic_model(tmp_path) / "model"
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(InputError, match="the chat template refuses these messages"):
        text_job(load(folder), ["1"], chat=True, max_new_tokens=4)


@pytest.mark.parametrize("stored", [5, ["a"], [{"nome": "x"}], {"default": 5}])
def test_templates_that_are_none_are_named(stored, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": stored}))
    with pytest.raises(InputError, match=r"tokenizer_config\.json: chat_template is neither a tex"):
        read_chat_templates(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"chat_template\.jinja cannot be read as text"):
        read_chat_templates(tmp_path)


@pytest.mark.parametrize(
    ("length", "settings", "expected"),
    [
        (100, {}, dj.Confidence(100, 25, 100, stop_at_eos=True)),
        (256, {}, dj.Confidence(256, 32, 256, stop_at_eos=True)),
        (5, {"block_length": 32}, dj.Confidence(5, 5, 5, stop_at_eos=True)),
        (40, {"block_length": 32, "steps": 5}, dj.Confidence(64, 32, 6, stop_at_eos=True)),
        (7, {"steps": 100, "threshold": 0.9},
         dj.Confidence(7, 7, 7, threshold=0.9, stop_at_eos=True)),
        (97, {"temperature": 0.5}, dj.Confidence(100, 25, 100, 0.5, stop_at_eos=True)),
    ],
)  # fmt: skip
def test_blocks_and_steps_always_fit(length, settings, expected):
    assert text_sampler(small_config(), length, **settings) == expected


@pytest.mark.parametrize("block", [{}, {"block_length": 5}, {"block_length": 200}])
def test_the_default_length_fits_in_whole_blocks(block):
    for room in range(1, 100):
        cfg = small_config(max_length=room + 7)
        length = fitting_length(cfg, 7, None, *block.values())
        sampler = text_sampler(cfg, length, **block)
        assert room / 2 < length <= sampler.gen_length <= room


def test_a_family_is_sampled_as_it_is_published():
    kinds = {
        dj.Autoregressive(9): {"causal": True},
        dj.Dream(9, steps=4): {"model_type": "dream", "right_shift": True},
        dj.Ancestral(9, 9): {"model_type": "mdlm", "subs": True},
        dj.BlockDiffusion(9, 4, stop_ids=(1,)): {"block_length": 4},
        dj.BlockDiffusion(9, 4, stop_at_eos=True): {"block_length": 4, "right_shift": True},
    }
    for sampler, changes in kinds.items():
        steps = {"steps": sampler.steps} if isinstance(sampler, dj.Dream) else {}
        assert text_sampler(small_config(**changes), 9, **steps) == sampler
    block_causal = small_config(block_length=4)
    assert text_sampler(block_causal, 9, block_length=None) == text_sampler(block_causal, 9)
    assert text_sampler(block_causal, 9, steps=6).steps_per_block == 2  # of 3 blocks


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        (["1"], {"max_new_tokens": 40}, "prompt 0 has 1 tokens, which with 40 new ones are more"),
        (["1"], {"max_new_tokens": 30, "block_length": 16}, "(in whole blocks 32) are more"),
        (["1" * 33], {}, "a prompt has 33 tokens, and the model 32 positions"),
        (["1"], {"max_new_tokens": 0}, "max_new_tokens=0 must be positive"),
        (["1"], {"block_length": 0}, "block_length=0 must be positive"),
        (["1"], {"block_length": "4"}, "block_length='4' must be an integer"),
        (["1"], {"temprature": 1.0}, "no setting 'temprature'; did you mean 'temperature'?"),
        (["1"], {"gen_length": 8}, "no setting 'gen_length'"),
        (["1"], {"chat": True}, "has no chat template"),
        ([[{"role": "user", "content": "1"}]], {}, "has no chat template"),
        ([["1", "2"]], {}, "prompt 0 is ['1', '2']; give a text, or a list of"),
        ([[{"role": "user", "content": None}]], {}, "'content': ...}, both of them texts"),
        ([[{"role": 1, "content": "1"}]], {}, "'content': ...}, both of them texts"),
        ([3], {}, "prompt 0 is 3; give a text"),
        (["1"], {"sampler": dj.Confidence(8), "steps": 3}, "sampler= has its own steps"),
        (["1"], {"batch_size": 0}, "batch_size=0 must be positive"),
        (["é"], {}, "é"),
    ],
)
def test_what_cannot_be_answered_is_one_line(model, prompts, settings, message, untyped):
    with pytest.raises(InputError, match=re.escape(message)) as error:
        generate_text(model, prompts, **settings)
    assert "\n" not in str(error.value)


def test_a_model_without_a_folder_needs_a_tokenizer(model):
    unnamed = Model(model.config, model.params)
    with pytest.raises(InputError, match="has no tokenizer; give tokenizer="):
        generate_text(unnamed, "1")
    [answer] = generate_text(unnamed, "1", tokenizer=model.path, max_new_tokens=4)
    assert answer.text == generate_text(model, "1", max_new_tokens=4)[0].text


def test_without_a_length_the_answer_takes_the_room_there_is(model):
    [answer] = generate_text(model, "+12,34=")
    assert len(answer.tokens) <= 32 - 7 and (answer.ended or len(answer.tokens) == 25)


def test_an_answer_is_shown_in_one_line():
    answer = dj.GeneratedText("4\n2", np.arange(3), None, True, 7, 0.5, 0.1)
    assert repr(answer) == r"GeneratedText('4\n2', 3 tokens, 7 passes, 50.0% of the layers)"
