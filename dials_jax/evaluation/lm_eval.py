"""lm-evaluation-harness evaluates a model of this library; for lm_eval 0.4.13.

    dials-lm-eval --model dials --model_args path=models/llada-8b,cache=dual --tasks gsm8k
    python eval.py --config configs/llada/harness.py --workdir runs/harness

    lm = DialsLM(model, tokenizer, policy=router, sampler=dj.Confidence(256, block_length=32))
    lm_eval.simple_evaluate(lm, tasks=["gsm8k"])

Importing this module registers "dials" as a model of the harness. The harness plans requests and
scores answers; `Responder` answers. Every process of a pod runs the harness on the same requests:
for the harness there is one process, and the devices are shared inside.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lm_eval.models  # noqa: F401  its own models: the harness does not register them after others
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, CacheHook
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import (
    get_rolling_token_windows,
    make_disjoint_window,
    simple_parse_args_string,
)

from dials_jax.config import to_dict
from dials_jax.config.typed import field_hints
from dials_jax.data.chat import Message, choose_template, read_chat_templates, render_chat
from dials_jax.data.tasks import Pair
from dials_jax.data.tokenizer import Tokenizer, encode_pair
from dials_jax.errors import InputError, nearest, require
from dials_jax.evaluation.answer_store import AnswerSettings, digest_text
from dials_jax.evaluation.harness import (
    HarnessModel,
    load_harness_model,
    make_sampler,
    parse_model_arguments,
    tokenizer_path,
)
from dials_jax.evaluation.responder import Cost, Responder
from dials_jax.evaluation.task_setup import warn_of_sampler
from dials_jax.evaluation.text_end import Stop, decode_to_end
from dials_jax.files import local_path, require_writable
from dials_jax.models.model import Model
from dials_jax.nn.policy import Policy, policy_name
from dials_jax.progress import progress_bar
from dials_jax.sampling.sampler import Sampler
from dials_jax.skipping.flops import Flops

OWNER = "dials_jax"  # in the harness's cache: whose answers it holds
OF_DRAWING = ("temperature", "top_p", "top_k")  # what counts with do_sample only


@register_model("dials")
class DialsLM(LM):
    """A model of this library as lm-evaluation-harness sees it."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        *,
        policy: Policy | None = None,
        sampler: Sampler | None = None,
        settings: AnswerSettings = AnswerSettings(),
        store: str | Path | None = None,
        tokenizer_folder: str | Path | None = None,
    ):
        """A loaded model.

        Args:
          sampler: None: `Confidence` for 256 tokens. A task's own length takes precedence.
          store: folder where every answer is kept; None: in memory.
          tokenizer_folder: has the chat templates; None: the model's folder.
        """
        super().__init__()
        self.sampler = make_sampler() if sampler is None else sampler
        warn_of_sampler("lm-eval", model, self.sampler)
        folder = Path(tokenizer_folder or model.path)
        self.tokenizer_folder = folder.parent if folder.is_file() else folder
        self.text, self.responder = tokenizer, Responder(model, policy, settings, store, _say)
        self.described = {"settings": to_dict(settings)}
        self._samplers: dict[Sampler, None] = {}
        self._template: str | None = None  # None: the default one

    @classmethod
    def load(cls, cfg: HarnessModel) -> DialsLM:
        """Loads what the settings name."""
        if cfg.store:
            require_writable(local_path(cfg.store, "store"), "store")
        model, tokenizer, policy = load_harness_model(cfg)
        settings = AnswerSettings(**{n: getattr(cfg, n) for n in field_hints(AnswerSettings)})
        lm = cls(
            model,
            tokenizer,
            policy=policy,
            sampler=cfg.sampler,
            settings=settings,
            store=cfg.store or None,
            tokenizer_folder=tokenizer_path(cfg),
        )
        lm.described = {"settings": to_dict(cfg)}
        return lm

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> DialsLM:
        """The harness's way to make a model. `device` and `max_batch_size` have no meaning here.

        Its command line always gives a batch size, so one among the model arguments counts more.
        """
        batch_size = (additional_config or {}).get("batch_size")
        given = dict(arg_dict)
        if batch_size is not None:
            require(
                str(batch_size).isdecimal(),
                f"batch_size={batch_size!r}: batches have one size here; give a number",
            )
            given.setdefault("batch_size", int(batch_size))
        return cls.load(parse_model_arguments(given))

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: Mapping[str, Any] | None = None
    ) -> DialsLM:
        """See `create_from_arg_obj`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    # -------------------------------------------------------------------------------- likelihood

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """A lower bound on log p(continuation | context) in nats, and whether it is greedy.

        The bound is exact for a continuation of one token; see `Likelihood` for both.
        """
        pairs = [self._pair(*request.args) for request in requests]
        answers = self._shown(self.responder.likelihoods(pairs), len(pairs), disable_tqdm)
        found = {}
        for index, likelihood in answers:
            found[index] = tuple(likelihood)
            self.cache_hook.add_partial("loglikelihood", requests[index].args, found[index])
        return [found[index] for index in range(len(pairs))]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """A lower bound on log p(text) in nats, so perplexities from it are upper bounds.

        As by the harness's own models, a text follows an end of text, and one with more tokens than
        positions is cut into windows: each token is scored once, after as many others as fit.
        """
        windows = [self._windows(*request.args) for request in requests]
        pairs = [pair for own in windows for pair in own]
        answers = self.responder.likelihoods(pairs, key_of_answer=True)
        found = dict(self._shown(answers, len(pairs), disable_tqdm))
        in_order = iter([found[index].log_likelihood for index in range(len(pairs))])
        sums = [math.fsum(itertools.islice(in_order, len(own))) for own in windows]
        for request, value in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return sums

    def _pair(self, context: str, continuation: str) -> Pair:
        """Without context, an end of text stands for it, as in the harness's own models."""
        if context == "":
            return [self._eos_id], self.text.encode(continuation)
        return encode_pair(self.text, context, continuation)

    def _windows(self, text: str) -> list[Pair]:
        windows = get_rolling_token_windows(
            token_list=self.text.encode(text),
            prefix_token=self._eos_id,
            max_seq_len=self.max_length - 1,  # the canvas holds context and answer
            context_len=1,
        )
        return list(map(make_disjoint_window, windows))

    # -------------------------------------------------------------------------------- generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The texts after the contexts, cut before the first stop string and the end of text."""
        draws = _draws(requests)
        plans = [self._plan(request.args[1]) for request in requests]
        groups: dict[tuple[Sampler, Stop], list[int]] = {}
        for index, (sampler, until, _) in enumerate(plans):
            stop = Stop(tuple(filter(None, until)), self.text)
            groups.setdefault((sampler, stop), []).append(index)
        self._samplers |= dict.fromkeys(sampler for sampler, _ in groups)
        texts: dict[int, str] = {}
        for (sampler, stop), members in groups.items():
            prompts = [self.text.encode(requests[i].args[0]) for i in members]
            prompts = [ids or [self._eos_id] for ids in prompts]
            found = self.responder.generations(prompts, sampler, [draws[i] for i in members], stop)
            for place, ids in self._shown(found, len(members), disable_tqdm):
                index = members[place]
                _, until, length = plans[index]
                texts[index] = self._text_of(ids[:length], until)
                self.cache_hook.add_partial("generate_until", requests[index].args, texts[index])
        return [texts[index] for index in range(len(requests))]

    def _plan(self, gen_kwargs: Mapping[str, Any]) -> tuple[Sampler, list[str], int]:
        """The sampler, the stop strings and the number of tokens that a request asks for.

        Raises: InputError for what no sampler of this kind can do.
        """
        kwargs = dict(normalize_gen_kwargs(dict(gen_kwargs), self.sampler.gen_length))
        until = handle_stop_sequences(kwargs.pop("until"), eos=None)
        length, drawn = kwargs.pop("max_gen_toks"), kwargs.pop("do_sample")
        for name in () if drawn else OF_DRAWING:
            kwargs.pop(name, None)  # the sampler's own stay
        sampler, fields = self.sampler, type(self.sampler).__dataclass_fields__
        for name in kwargs:
            known = f"{type(sampler).__name__} has no setting {name!r} of gen_kwargs"
            require(name in fields, f"{known}{nearest(name, fields)}")
        try:
            sampler = replace(sampler, **kwargs) if kwargs else sampler
            return _with_length(sampler, length), until, length
        except InputError as error:
            raise InputError(
                f"a task generates max_gen_toks={length} tokens: {error}; or give another length "
                "with gen_kwargs"
            ) from error

    def _text_of(self, ids: Sequence[int], until: Sequence[str]) -> str:
        text = decode_to_end(ids, self.text, self.responder.model.config, until)
        return postprocess_generated_text(text, list(until), None)

    # ------------------------------------------------------------------------------ chat templates

    @functools.cached_property
    def _templates(self) -> dict[str, str]:
        return read_chat_templates(self.tokenizer_folder)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template that is applied: the default one, or the one of this name."""
        if not chat_template:
            return None
        name = chat_template if isinstance(chat_template, str) else "default"
        self._template = choose_template(self._templates, name)
        return self._template

    def apply_chat_template(
        self, chat_history: list[Message], add_generation_prompt: bool = True
    ) -> str:
        """The prompt of a conversation; without its system message if the template knows none.

        So does the harness's own model: it gives a task's description as a system message.
        """
        template = self._template or choose_template(self._templates)
        settings = self.text, self.tokenizer_folder, add_generation_prompt
        others = [message for message in chat_history if message["role"] != "system"]
        try:
            return render_chat(template, chat_history, *settings)
        except InputError:
            if len(others) == len(chat_history):
                raise
        warnings.warn("the chat template takes no system message; it is left out", stacklevel=1)
        return render_chat(template, others, *settings)

    @property
    def tokenizer_name(self) -> str:
        """Distinguishes tokenizers in the harness's file names."""
        return f"{self.tokenizer_folder.name}-{self.text.fingerprint}"

    # ----------------------------------------------------------------------------------- the model

    @property
    def max_length(self) -> int:
        """Positions of the model."""
        return self.responder.model.config.max_length

    @property
    def batch_size(self) -> int:
        """Sequences per batch."""
        return self.responder.settings.batch_size

    @property
    def _eos_id(self) -> int:
        eos_id = self.responder.model.config.eos_id
        require(eos_id is not None, "the model's config names no end of text; set its eos_id")
        return eos_id

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Refuses a file of `--use_cache` with answers of another model or other settings.

        The harness finds an answer there by its request alone.
        """
        kept = cache_hook.dbdict
        if kept is not None:
            facts = self.responder.store.identity, self.sampler, self.text.fingerprint
            own = digest_text(repr(facts))
            require(
                len(kept) == 0 or kept.get(OWNER) == own,
                f"{kept.filename} holds answers of another model or other settings; give "
                "--use_cache another path",
            )
            kept[OWNER] = own
        super().set_cache_hook(cache_hook)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness stores beside its results: the model, and what its answers cost."""
        model, settings = self.responder.model, self.responder.settings
        costs = {kind: _total(parts) for kind, parts in self.responder.costs.items() if parts}
        everything = [part for parts in self.responder.costs.values() for part in parts]
        return {
            "model_num_parameters": model.num_parameters,
            "model_dtype": model.config.dtype,
            "model_fingerprint": model.fingerprint,
            "policy": policy_name(self.responder.policy),
            "samplers": [f"{sampler}" for sampler in self._samplers],
            "loglikelihood_is": f"a lower bound (NELBO, at most {settings.num_samples} samples)",
            "num_cut": self.responder.num_cut,
            **(_total(everything) if everything else {}),
            "costs": costs,
            **self.described,
        }

    def _shown(
        self, answers: Iterator[tuple[int, Any]], total: int, disable: bool
    ) -> Iterator[tuple[int, Any]]:
        if disable:
            yield from answers
            return
        with progress_bar(total, 0, "requests", "request") as bar:
            for answer in answers:
                bar.update()
                yield answer


def _say(line: str) -> None:
    """On standard error: the harness prints its tables on the other."""
    print(line, file=sys.stderr, flush=True)


def _draws(requests: Sequence[Instance]) -> list[int]:
    """Which sample of its prompt each request wants: `repeats` are one request, given again."""
    seen: Counter[int] = Counter()
    draws = []
    for request in requests:
        draws.append(seen[id(request)])
        seen[id(request)] += 1
    return draws


def _with_length(sampler: Any, length: int) -> Any:
    """The sampler for this many tokens, or for the next whole block."""
    if length == sampler.gen_length:
        return sampler
    block = getattr(sampler, "block_length", sampler.gen_length)
    whole = -(-length // block) * block if block < sampler.gen_length else length
    return sampler.with_length(whole)


def _total(costs: Sequence[Cost]) -> dict[str, Any]:
    """`nfe` is the mean number of model passes per request."""
    flops, requests = Flops.sum([c.flops for c in costs]), sum(c.num_requests for c in costs)
    return {
        "skip_rate": 1 - flops.layers_run,
        "flops_share": flops.flops_share,
        "flops": flops.model_total,
        "nfe": sum(c.num_passes for c in costs) / requests,
        "seconds": flops.seconds,
        "num_requests": requests,
    }
