"""lm-evaluation-harness on small published models: its own tasks, offline, on local records."""

import functools
import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

lm_eval = pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.model import LM  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from dials_jax.caching.plain import DualCache  # noqa: E402
from dials_jax.cli.harness import lm_eval_command  # noqa: E402
from dials_jax.config import HarnessConfig, HarnessModel  # noqa: E402
from dials_jax.data.tokenizer import load_tokenizer  # noqa: E402
from dials_jax.errors import InputError  # noqa: E402
from dials_jax.evaluation import harness_run  # noqa: E402
from dials_jax.evaluation.answer_store import AnswerSettings  # noqa: E402
from dials_jax.evaluation.batched import request_hash, request_keys  # noqa: E402
from dials_jax.evaluation.harness import make_sampler, parse_model_arguments  # noqa: E402
from dials_jax.evaluation.likelihood import draw_masked  # noqa: E402
from dials_jax.evaluation.lm_eval import DialsLM  # noqa: E402
from dials_jax.evaluation.responder import Responder  # noqa: E402
from dials_jax.loading import load  # noqa: E402
from dials_jax.reference import Decoder  # noqa: E402
from dials_jax.sampling.ancestral import Ancestral  # noqa: E402
from dials_jax.sampling.confidence import Confidence  # noqa: E402
from dials_jax.sampling.dream import Dream  # noqa: E402
from dials_jax.sampling.generate import generate  # noqa: E402
from tests.evaluation.harness_cases import (  # noqa: E402
    make_model_folder,
    write_demo_tasks,
    write_task_files,
)

ROOT = Path(__file__).parents[2]
SETTINGS = AnswerSettings(num_samples=4, batch_size=3, max_programs=2)
SAMPLERS = {
    "llada_tiny": Confidence(gen_length=8, block_length=4),
    "dream_tiny": Dream(max_new_tokens=8, steps=8),
}
TEN = list(enumerate("abcdefghij"))
TASKS = ("gsm8k", "piqa", "arc_challenge")


@pytest.fixture(scope="module", autouse=True)
def offline():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def folders(made_once):
    """Two models, and the folder of task files."""

    def make(folder):
        for name in SAMPLERS:
            make_model_folder(name, folder / name)
        (folder / "tasks").mkdir()
        write_task_files(folder / "tasks", folder / "datasets")

    return made_once("harness", make)


@pytest.fixture(scope="module")
def models(folders):
    return {name: load(folders / name) for name in SAMPLERS}


@pytest.fixture(scope="module")
def manager(folders):
    return TaskManager(include_path=str(folders / "tasks"), include_defaults=False)


@pytest.fixture
def make_lm(models):
    def make(name="llada_tiny", settings=SETTINGS, **kwargs):
        model = models[name]
        kwargs = {"sampler": SAMPLERS[name]} | kwargs
        return DialsLM(model, load_tokenizer(model.path), settings=settings, **kwargs)

    return make


def evaluate(lm, manager, tasks=TASKS, **kwargs):
    """The harness's results, without its standard errors."""
    settings = {"num_fewshot": 0, "limit": 2, "bootstrap_iters": 0} | kwargs
    return simple_evaluate(lm, tasks=list(tasks), task_manager=manager, **settings)


def requests_of(method, *arguments):
    return [Instance(method, {}, args, i, ("task", i, 1)) for i, args in enumerate(arguments)]


def answered(results):
    """Every (task, context, rest of the request) with its answer, whatever the order."""
    return {
        (task, *map(str, arguments)): resp[0]
        for task, samples in results["samples"].items()
        for sample in samples
        for arguments, resp in zip(sample["arguments"], sample["resps"], strict=True)
    }


# ------------------------------------------------------------------------- agreement, one by one


def plain_likelihood(model, text, context, continuation, num_samples=4):
    """LLaDA's estimate and the greedy flag: one pair, no padding, one row a copy, NumPy sums."""
    prompt, whole = text.encode(context), text.encode(context + continuation)
    answer = np.array(whole[len(prompt) :])
    assert whole[: len(prompt)] == prompt
    mask_key, _ = jax.random.split(request_keys(0, [request_hash(tuple(prompt))])[0])
    number = 1 if len(answer) == 1 else num_samples
    masked = [
        np.asarray(draw_masked(mask_key, jnp.array(i), jnp.ones(len(answer), bool), num_samples))
        for i in range(number)
    ]
    masked = np.array([*masked, np.ones(len(answer), bool)])
    answers = np.where(masked, model.config.mask_id, answer)
    rows = np.concatenate([np.tile(prompt, (number + 1, 1)), answers], axis=1)
    logits = np.asarray(model.apply(rows).logits, np.float64)[:, len(prompt) :]
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    log_p = np.take_along_axis(log_p, np.broadcast_to(answer, masked.shape)[..., None], 2)[..., 0]
    estimates = (log_p * masked).sum(axis=1) / masked.mean(axis=1)
    return estimates[:number].mean(), bool((logits[-1].argmax(axis=-1) == answer).all())


def plain_text(model, text, context):
    prompt = text.encode(context)
    if model.config.model_type == "llada":  # in NumPy, one sequence and one step at a time
        decoder = Decoder(model, prompt, SAMPLERS["llada_tiny"])
        decoder.decode()
        ids = decoder.tokens[len(prompt) :].tolist()
    else:
        out = generate(model, np.array([prompt]), sampler=SAMPLERS["dream_tiny"])
        ids = out.tokens[0, len(prompt) :].tolist()
    eos_id = model.config.eos_id
    return text.decode(ids[: ids.index(eos_id)] if eos_id in ids else ids)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_request_of_three_tasks_agrees_with_a_plain_reference(name, make_lm, models, manager):
    model, lm = models[name], make_lm(name)
    results = evaluate(lm, manager)
    found = answered(results)
    assert len(found) == 2 + 2 * 2 + 2 * 4
    for (task, context, rest), answer in found.items():
        if task == "gsm8k":
            assert answer == plain_text(model, lm.text, context)
        else:
            value, is_greedy = plain_likelihood(model, lm.text, context, rest)
            assert answer[0] == pytest.approx(value, abs=1e-4 * abs(value))
            assert answer[1] == is_greedy
    info = results["config"]
    assert (info["skip_rate"], info["flops_share"]) == (0.0, pytest.approx(1.0))
    assert info["costs"]["generation"]["nfe"] == 8 and info["seconds"] > 0
    json.dumps(info)


def test_a_model_of_characters_and_the_task_of_the_demo_agree_with_it_too(
    arithmetic_model, tmp_path
):
    model = load(arithmetic_model)
    lm = DialsLM(
        model, load_tokenizer(model.path), sampler=SAMPLERS["llada_tiny"], settings=SETTINGS
    )
    write_demo_tasks(tmp_path)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = answered(evaluate(lm, manager, ("demo_text", "demo_choice"), limit=4))
    assert len(found) == 4 + 4 * 2
    for (task, context, rest), answer in found.items():
        if task == "demo_text":
            assert answer == plain_text(model, lm.text, context)
        else:
            value, is_greedy = plain_likelihood(model, lm.text, context, rest)
            assert answer == (pytest.approx(value, abs=1e-4), is_greedy)


def test_a_stop_string_saves_steps_and_changes_no_text(make_lm, manager):
    """The third character that the model writes first, as a task's stop string."""
    whole, early = Confidence(24, block_length=4), Confidence(24, block_length=4, stop_at_eos=True)
    one = requests_of("generate_until", ("Planets orbit", {"until": []}))
    [text] = make_lm(sampler=whole).generate_until(one)
    arguments = [(p, {"until": [text[2], "no such text"]}) for p in ("Planets orbit", "1+1=", "A")]
    requests = requests_of("generate_until", *arguments)
    plain, cut = make_lm(sampler=whole), make_lm(sampler=early)
    assert cut.generate_until(requests) == plain.generate_until(requests)
    nfe = [lm.get_model_info()["nfe"] for lm in (cut, plain)]
    assert nfe[0] < nfe[1] == 24


def test_batch_size_and_order_change_no_answer(make_lm, manager):
    first = answered(evaluate(make_lm(), manager))
    other = AnswerSettings(num_samples=4, batch_size=5, bucket=8, max_programs=3)
    second = answered(evaluate(make_lm(settings=other), manager, TASKS[::-1]))
    assert first.keys() == second.keys()
    for request, answer in first.items():
        if request[0] == "gsm8k":
            assert second[request] == answer
        else:
            assert second[request][0] == pytest.approx(answer[0], rel=1e-4)
            assert second[request][1] == answer[1]


def test_the_rolling_likelihood_is_a_sum_of_bounds_over_windows(make_lm, models):
    """With one copy per window; the first window follows an end of text."""
    lm = make_lm(settings=AnswerSettings(num_samples=1, batch_size=2))
    long = "How many people did he lose to? " * 12
    ids = lm.text.encode(long)
    assert 255 - 1 < len(ids) < 2 * 255
    short, whole = lm.loglikelihood_rolling(requests_of("rolling", ("Earth.",), (long,)))
    windows = [((0,), ids[:255]), (ids[len(ids) - 256 : 255], ids[255:])]  # the last one is full
    parts = dict(lm.responder.likelihoods(windows, key_of_answer=True))
    assert whole == pytest.approx(sum(one.log_likelihood for one in parts.values()), rel=1e-6)
    alone = dict(lm.responder.likelihoods([((0,), lm.text.encode("Earth."))], key_of_answer=True))
    assert short == alone[0].log_likelihood < 0
    assert "lower bound" in lm.get_model_info()["loglikelihood_is"]


def test_without_a_context_an_end_of_text_stands_for_it(make_lm):
    lm = make_lm()
    [(value, _)] = lm.loglikelihood(requests_of("loglikelihood", ("", "Earth.")))
    [(_, expected)] = lm.responder.likelihoods([((0,), lm.text.encode("Earth."))])
    assert value == expected.log_likelihood


# ------------------------------------------------------------------ texts: where they end, filters

TEXTS = (  # what the model writes, as tokens; <|endoftext|> and <|im_end|> are special
    "So 20-16=4\n#### 4\nQuestion: How many?\nAnswer: 5",
    "#### 27<|endoftext|>#### 5",
    "It is $1,234.50.<|im_end|> #### 7",
    " #### -3.</s> #### 9",
    "nothing at all",
    "<|endoftext|>",
    "He pays 12,345 Quest</sQuestion:",
    "\u2019s #### 12\n#### 13\n",
)


def fixed_ids(text, length=64):
    """Ids of a text as a model would have generated it, filled with end of text."""
    ids = text.backend.encode if hasattr(text, "backend") else text.encode
    return [
        (row := ids(one, add_special_tokens=False).ids) + [0] * (length - len(row)) for one in TEXTS
    ]


class FixedTexts(LM):
    """Answers with texts that end as those of the harness's `hf` model end."""

    def __init__(self, texts):
        super().__init__()
        self.texts = texts

    def generate_until(self, requests):
        from lm_eval.models.utils import postprocess_generated_text

        answers = []
        for text, request in zip(self.texts, requests, strict=True):
            # HF generation stops after an end of text; special tokens are not decoded.
            written = text.partition("<|endoftext|>")[0].replace("<|im_end|>", "")
            until = [*request.args[1]["until"], "<|endoftext|>"]
            answers.append(postprocess_generated_text(written, until, None))
        return answers

    def loglikelihood(self, requests):
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


@pytest.fixture
def writing(monkeypatch):
    """`writing(ids)`: every model generates these."""

    def write(ids):
        def generations(self, prompts, sampler, draws=None, stop=None):
            yield from reversed(list(enumerate(ids[: len(prompts)])))

        monkeypatch.setattr(Responder, "generations", generations)

    return write


@pytest.mark.parametrize("first", [0, 4])
def test_stop_strings_and_filters_score_as_for_the_harness_own_model(
    make_lm, manager, writing, first
):
    lm = make_lm(sampler=Confidence(gen_length=64))
    writing(fixed_ids(lm.text)[first:])
    ours = evaluate(lm, manager, ["gsm8k"], limit=4)
    theirs = evaluate(FixedTexts(TEXTS[first : first + 4]), manager, ["gsm8k"], limit=4)
    pairs = zip(ours["samples"]["gsm8k"], theirs["samples"]["gsm8k"], strict=True)
    for own, other in pairs:
        if "<|im_end|>" in TEXTS[first + own["doc_id"]]:  # a stop string that is not decoded
            assert own["resps"] == [["It is $1,234.50."]]
            continue
        for field in ("resps", "filtered_resps", "filter", "exact_match"):
            assert own[field] == other[field]


def test_texts_are_those_of_the_harness_own_hf_model(make_lm, writing):
    """HFLM itself generates from the same ids. It needs torch."""
    torch = pytest.importorskip("torch")
    from transformers import PreTrainedTokenizerFast

    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    lm = make_lm(sampler=Confidence(gen_length=64))
    ids = fixed_ids(lm.text)

    class FixedHF(huggingface.HFLM):
        def __init__(self):
            self._rank, self._world_size, self.batch_size_per_gpu = 0, 1, len(ids)
            self.tokenizer = PreTrainedTokenizerFast(
                tokenizer_object=lm.text.backend,
                eos_token="<|endoftext|>",
                pad_token="<|endoftext|>",
            )
            self._max_length, self._device, self.backend = 256, torch.device("cpu"), "causal"
            self.truncation, self.think_end_token, self.add_bos_token = False, None, False
            self.custom_prefix_token_id = None
            self.cache_hook = lm.cache_hook

        def _model_generate(self, context, **kwargs):
            return torch.cat([context, torch.tensor(ids)], dim=1)

    until = {"until": ["Question:", "</s>"], "max_gen_toks": 64, "do_sample": False}
    requests = requests_of("generate_until", *[("1+1=", until)] * len(ids))
    writing(ids)
    theirs = FixedHF().generate_until(requests, disable_tqdm=True)
    ours = lm.generate_until(requests)
    # Ids after an end of text cannot come from HF's generate, which pads there: "#### 5".
    theirs[1] = theirs[1].replace("#### 5", "")
    assert ours == theirs


# ----------------------------------------------------------------------- settings of the requests


@pytest.fixture
def planned(monkeypatch):
    """The samplers that generate; nothing runs."""
    samplers = []

    def generations(self, prompts, sampler, draws=None, stop=None):
        samplers.append(sampler)
        yield from enumerate([[7, 0, 9] for _ in prompts])

    monkeypatch.setattr(Responder, "generations", generations)
    return samplers


@pytest.mark.parametrize(
    ("kwargs", "sampler"),
    [
        ({}, Confidence(8, block_length=4)),
        ({"max_gen_toks": 6}, Confidence(8, block_length=4)),
        ({"max_gen_toks": 10}, Confidence(12, block_length=4)),
        ({"max_new_tokens": 4}, Confidence(4, block_length=4, steps=4)),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.9}, Confidence(8, block_length=4)),
        ({"do_sample": True, "temperature": 0.7}, Confidence(8, block_length=4, temperature=0.7)),
        ({"threshold": 0.9}, Confidence(8, block_length=4, threshold=0.9)),
    ],
)
def test_generation_settings_of_a_task_change_the_sampler(make_lm, planned, kwargs, sampler):
    lm = make_lm()
    lm.generate_until(requests_of("generate_until", ("a", {"until": ["x"], **kwargs})))
    assert planned == [sampler]


def test_a_text_has_no_more_tokens_than_the_task_allows(make_lm, writing):
    lm = make_lm()
    writing([[50, 51, 52, 53, 54, 55, 56, 57]])
    [text] = lm.generate_until(
        requests_of("generate_until", ("a", {"until": [], "max_gen_toks": 5}))
    )
    assert text == lm.text.decode([50, 51, 52, 53, 54])


def test_requests_of_several_lengths_keep_their_order(make_lm, monkeypatch):
    def echo(self, prompts, sampler, draws=None, stop=None):
        yield from reversed([(i, list(ids)) for i, ids in enumerate(prompts)])

    monkeypatch.setattr(Responder, "generations", echo)
    arguments = [(text, {"until": [], "max_gen_toks": 4 * (1 + i % 2)}) for i, text in TEN]
    texts = make_lm().generate_until(requests_of("generate_until", *arguments))
    assert texts == [text for _, text in TEN]


def test_generation_settings_that_no_sampler_has_are_refused(make_lm, planned):
    requests = requests_of("generate_until", ("a", {"until": [], "blok_length": 2}))
    with pytest.raises(InputError, match=r"'blok_length'.*did you mean 'block_length'"):
        make_lm().generate_until(requests)
    requests = requests_of("generate_until", ("a", {"until": [], "max_gen_toks": 20}))
    with pytest.raises(InputError, match=r"max_gen_toks=20 tokens: steps=6 must be divisible"):
        make_lm(sampler=Confidence(8, block_length=4, steps=6)).generate_until(requests)


def test_repeats_of_a_request_draw_other_texts(make_lm):
    lm = make_lm(sampler=Confidence(8, block_length=4, temperature=2.0))
    one, other = requests_of("generate_until", *[("Planets orbit", {"until": []})] * 2)
    texts = lm.generate_until([one, one, one, other])
    assert texts[0] == texts[3]  # an equal request is no repeat
    assert len(set(texts)) > 1


# ------------------------------------------------------------------------------- model arguments


def test_model_arguments_name_fields_of_the_model_and_of_its_sampler():
    given = {"path": "m", "cache": "dual", "sampler": "dream", "steps": 64, "temperature": 0.1}
    found = parse_model_arguments(given | {"static": "7+9", "num_samples": 32})
    assert found == HarnessModel(
        path="m", cache=DualCache(), static=(7, 9), num_samples=32,
        sampler=Dream(max_new_tokens=256, steps=64, temperature=0.1),
    )  # fmt: skip
    guided = parse_model_arguments({"path": "m", "cfg_scale": 0.5, "block_length": 32})
    assert guided.cfg_scale == guided.sampler.cfg_scale == 0.5
    assert guided.sampler.stop_at_eos and guided.sampler.gen_length == 256
    for static in (7, [7], "7"):
        assert parse_model_arguments({"path": "m", "static": static}).static == (7,)
    assert make_sampler("ancestral") == Ancestral(256, 256)
    assert parse_model_arguments({"path": "m", "cache": None}).cache is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"path": "m", "num_sample": 4}, "'num_sample'; did you mean 'num_samples'"),
        ({"path": "m", "blok_length": 4}, "'blok_length'; did you mean 'block_length'"),
        ({"path": "m", "alg": "entropy"}, "'alg' of sampler=confidence.*sampler=dream"),
        ({"path": "m", "cache": "duel"}, "did you mean 'dual'"),
        ({"path": "m", "sampler": "dreem"}, "did you mean 'dream'"),
        ({"path": "m", "static": "a+b"}, r"static='a\+b': give layers"),
        ({"path": "m", "router": "r", "num_random": 1}, "router and num_random are several"),
        ({"path": "m", "execution_ratio": 0.5}, "execution_ratio is of a router; give router"),
        ({"path": "m", "steps": 0.5}, "steps=0.5 must be an integer"),
        ({"steps": 4}, "path is missing"),
        ({"pth": "m"}, "'pth'; did you mean 'path'"),
    ],
)
def test_wrong_model_arguments_are_refused_in_one_line(given, message, untyped):
    with pytest.raises(InputError, match=message):
        parse_model_arguments(given)


def test_the_harness_makes_the_model_from_texts(folders):
    assert get_model("dials") is DialsLM
    assert get_model("dummy")  # the harness's own models are still there
    text = f"path={folders / 'llada_tiny'},block_length=8,gen_length=16,num_random=2,num_samples=4"
    cli = {"batch_size": "3", "max_batch_size": None, "device": "cuda:0"}
    lm = DialsLM.create_from_arg_string(text, cli)
    assert (lm.batch_size, lm.sampler.gen_length) == (3, 16)
    assert lm.get_model_info()["policy"] == "random"
    json.dumps(lm.get_model_info())
    assert DialsLM.create_from_arg_string(text + ",batch_size=7", cli).batch_size == 7
    with pytest.raises(InputError, match=r"batch_size='auto'.*give a number"):
        DialsLM.create_from_arg_string(text, cli | {"batch_size": "auto"})


def test_a_dream_model_is_not_sampled_by_lladas_rules_in_silence(make_lm):
    with pytest.warns(UserWarning, match="this Dream model is sampled by LLaDA's rules"):
        make_lm("dream_tiny", sampler=make_sampler())


# ------------------------------------------------------------------------------------------ chat


def test_chat_templates_make_the_prompt(make_lm, folders):
    lm = make_lm()
    chat = [{"role": "user", "content": "1+1="}]
    assert lm.apply_chat_template(chat) == "<|user|>1+1=<|assistant|>"
    prefilled = [*chat, {"role": "assistant", "content": "It is"}]
    assert lm.apply_chat_template(prefilled, add_generation_prompt=False).endswith("It is")
    assert "messages" in lm.chat_template(True)
    assert lm.text.fingerprint in lm.tokenizer_name
    with pytest.raises(InputError, match="no chat template is called 'defualt'; did you mean"):
        lm.chat_template("defualt")


def test_a_template_that_knows_no_system_goes_without(make_lm, folders, tmp_path):
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    config = {"chat_template": template + "{{ bos_token }}{{ messages[0].content }}"}
    config["bos_token"] = {"content": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    lm = make_lm(tokenizer_folder=tmp_path)
    chat = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "hi"}]
    with pytest.warns(UserWarning, match="takes no system message"):
        assert lm.apply_chat_template(chat) == "<|im_end|>hi"
    with pytest.raises(InputError, match="has no chat template"):
        make_lm(tokenizer_folder=tmp_path / "absent").chat_template(True)


# --------------------------------------------------------------- the command line, and eval.py


def as_texts(values):
    """As the harness writes samples: every number and text as a text."""
    return list(map(as_texts, values)) if isinstance(values, list | tuple) else str(values)


def test_the_command_line_gives_the_results_of_the_same_call_in_process(
    make_lm, manager, folders, monkeypatch, tmp_path
):
    expected = evaluate(make_lm(), manager)
    monkeypatch.setattr(  # thousands of built-in tasks take ten seconds to find
        "lm_eval.tasks.TaskManager", functools.partial(TaskManager, include_defaults=False)
    )
    arguments = (
        f"--model dials --model_args path={folders / 'llada_tiny'},gen_length=8,block_length=4,"
        f"stop_at_eos=False,num_samples=4,store={tmp_path / 'store'} --batch_size 3 "
        f"--include_path {folders / 'tasks'} --tasks {','.join(TASKS)} --num_fewshot 0 --limit 2 "
        f"--output_path {tmp_path / 'out'} --log_samples"
    )
    monkeypatch.setattr(sys, "argv", ["dials-lm-eval", *arguments.split()])
    lm_eval_command()
    [file] = tmp_path.glob("out/**/results_*.json")
    results = json.loads(file.read_text())
    assert results["config"]["nfe"] == expected["config"]["nfe"]
    for task in TASKS:
        found = results["results"][task]
        for name in found.keys() & {"acc,none", "acc_norm,none", "exact_match,strict-match"}:
            assert found[name] == expected["results"][task][name]
        [samples] = tmp_path.glob(f"out/**/samples_{task}_*.jsonl")
        own = [json.loads(line) for line in samples.read_text().splitlines()]
        wanted = [as_texts(sample["resps"]) for sample in expected["samples"][task]]
        assert [sample["resps"] for sample in own] == wanted
    assert len(list((tmp_path / "store").glob("*/runs.jsonl"))) == 2


def test_a_wrong_argument_ends_the_command_with_one_line(monkeypatch, capsys, folders):
    monkeypatch.setattr(
        "lm_eval.tasks.TaskManager", functools.partial(TaskManager, include_defaults=False)
    )
    arguments = f"--model dials --model_args path=x,stepz=4 --include_path {folders / 'tasks'}"
    monkeypatch.setattr(sys, "argv", ["dials-lm-eval", *arguments.split(), "--tasks", "piqa"])
    with pytest.raises(SystemExit) as stop:
        lm_eval_command()
    assert stop.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == "error: unknown model argument 'stepz'; did you mean 'steps'?"


def harness_config(folders, **changes):
    model = HarnessModel(
        path=str(folders / "llada_tiny"), sampler=SAMPLERS["llada_tiny"], num_samples=4,
        batch_size=3, max_programs=2,
    )  # fmt: skip
    settings = {"model": model, "tasks": TASKS, "num_fewshot": 0, "limit": 2}
    settings |= {"include_path": str(folders / "tasks"), "include_defaults": False}
    return HarnessConfig(**settings | {"bootstrap_iters": 0} | changes)


def test_a_killed_evaluation_continues_with_identical_results(folders, tmp_path, monkeypatch):
    cfg = harness_config(folders)
    expected = harness_run.run_harness(cfg, tmp_path / "whole")
    batches = []
    real = Responder._likelihood_record

    def failing(self, *args):
        batches.append(args)
        if len(batches) == 3:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(Responder, "_likelihood_record", failing)
    with pytest.raises(KeyboardInterrupt):
        harness_run.run_harness(cfg, tmp_path / "killed")
    found = harness_run.run_harness(cfg, tmp_path / "killed")
    assert answered(found) == answered(expected)
    assert found["results"] == expected["results"]
    stored = json.loads((tmp_path / "killed" / "results.json").read_text())
    assert stored["results"]["piqa"]["acc,none"] == expected["results"]["piqa"]["acc,none"]
    lines = (tmp_path / "killed" / "samples" / "piqa.jsonl").read_text().splitlines()
    assert [json.loads(line)["doc_id"] for line in lines] == [0, 1]
    before = len(batches)
    harness_run.run_harness(cfg, tmp_path / "killed")
    assert len(batches) == before  # everything was kept


def test_a_task_that_the_harness_lacks_is_refused_before_the_model_is_loaded(folders, tmp_path):
    cfg = harness_config(folders, tasks=("pica",), model=HarnessModel(path="absent"))
    with pytest.raises(InputError, match="lm-eval has no task 'pica'; did you mean 'piqa'"):
        harness_run.run_harness(cfg, tmp_path / "out")


def test_the_harness_own_cache_serves_one_model_and_settings(make_lm, manager, tmp_path):
    """It finds answers by their request alone, so other settings need another file."""
    use_cache = {"tasks": ["piqa"], "use_cache": str(tmp_path / "cache")}
    first = evaluate(make_lm(), manager, **use_cache)
    assert answered(evaluate(make_lm(), manager, **use_cache)) == answered(first)
    changed = AnswerSettings(num_samples=2, batch_size=3)
    with pytest.raises(InputError, match="answers of another model or other settings"):
        evaluate(make_lm(settings=changed), manager, **use_cache)


def test_every_process_is_the_only_one_for_the_harness(make_lm):
    """It would gather results by torch otherwise."""
    lm = make_lm()
    assert (lm.rank, lm.world_size) == (0, 1)


def test_the_example_of_the_documentation_runs(models, manager):
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    section = page.partition("## By lm-evaluation-harness")[2].partition("\n## ")[0]
    [example] = re.findall(r"^```python\n(.*?)^```", section, re.M | re.S)
    model = models["llada_tiny"]
    names = {"model": model, "tokenizer": load_tokenizer(model.path), "tasks": manager}
    exec(example, names)
    assert names["results"]["config"]["skip_rate"] == 1 / 8
