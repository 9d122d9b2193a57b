"""Generations that can be played again: `dj.replay` and `dials watch`.

page = replay(model, "1 + 1 =", policy=router)  # a notebook shows it
page.save("replay.html")
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

import dials_jax
from dials_jax.caching.cache import Cache
from dials_jax.config import Seed, as_list, typed
from dials_jax.config.typed import field_hints
from dials_jax.data.tokenizer import Tokenizer
from dials_jax.errors import nearest, require
from dials_jax.models.model import Model, require_model
from dials_jax.nn.policy import Policy, policy_name
from dials_jax.reporting.replay import Replay, Scene, run_of
from dials_jax.sampling.block_diffusion import BlockDiffusion
from dials_jax.sampling.confidence import Confidence
from dials_jax.sampling.generate import generate
from dials_jax.sampling.generation import Generation
from dials_jax.sampling.infill import infill
from dials_jax.sampling.model_schedule import Schedule
from dials_jax.sampling.sampler import Sampler
from dials_jax.skipping.flops import layer_flops
from dials_jax.text import Prompt, draw_keys, open_reader, text_job

FULL_DEPTH = "full depth"


@typed
def replay(
    model: Model | Mapping[str, Model],
    prompts: str | Sequence[Prompt],
    *,
    policy: Policy | Mapping[str, Policy | None] | None = None,
    cache: Cache | None = None,
    schedule: Schedule | None = None,
    tokenizer: Tokenizer | str | Path | None = None,
    seed: Seed = 0,
    compare: bool = True,
    **settings: Any,
) -> Replay:
    """Answers prompts, and keeps what every model call did.

    Args:
      model: one, or those that a schedule names, by letter.
      prompts: texts or conversations, as in `generate_text`. [MASK] in texts is filled, in all of
        them or in none.
      compare: also answer them at full depth, with the same random numbers: by the largest model,
        without policy and cache.
      settings: of `text_job`, such as sampler, max_new_tokens, threshold or chat; for texts with
        [MASK] sampler, or settings of `Confidence`.

    Raises: InputError for what `generate` or `infill` refuse.
    """
    prompts = as_list(prompts)
    require(len(prompts) > 0, "there are no prompts; give at least one")
    models = dict(model) if isinstance(model, Mapping) else {"": model}
    require(bool(models), "there are no models; give at least one")
    for one in models.values():
        require_model(one)
    largest = max(models.values(), key=lambda m: m.num_layers * layer_flops(m.config, 1))
    task = _read(largest, prompts, tokenizer, settings)
    left_out = {"policy": policy, "cache": cache, "schedule": schedule}
    left_out = {name: value for name, value in left_out.items() if value is not None}
    for name in left_out.keys() & {"cache", "schedule"} if task.fills_masks else ():
        require(False, f"{name} has no meaning where [MASK] is filled; leave it out")
    runs = {run_name(left_out): (model, left_out)}
    if left_out and compare:
        runs = {FULL_DEPTH: (largest, {})} | runs
    names, outs = list(runs), [task.run(*one, seed) for one in runs.values()]
    scenes = tuple(_scene(task, number, names, outs, schedule) for number in range(len(prompts)))
    seen = {int(token) for scene in scenes for run in scene.runs for token in np.unique(run.tokens)}
    seen |= {int(token) for scene in scenes for token in scene.canvas}
    return Replay(
        scenes=scenes,
        pieces={token: token_text(task.tokenizer, token) for token in sorted(seen)},
        special=frozenset(token for token in seen if task.tokenizer.is_added(token)),
        settings=shown_settings(models, left_out, task.sampler, seed),
        block_length=task.block_length,
        shift=int(largest.config.right_shift or largest.config.causal),
    )


@dataclasses.dataclass(frozen=True)
class _Task:
    """Prompts as token ids, and how they are answered."""

    tokenizer: Tokenizer
    prompts: list[list[int]]
    sampler: Sampler
    blank_id: int
    fills_masks: bool

    @property
    def block_length(self) -> int:
        """Tokens that are filled before those to their right; texts with [MASK] are one block."""
        if self.fills_masks:
            return max(map(len, self.prompts))
        return getattr(self.sampler, "block_length", self.sampler.gen_length)

    def run(self, model: Any, left_out: Mapping[str, Any], seed: int) -> Generation:
        settings = {"sampler": self.sampler, "key": draw_keys(seed, self.prompts)} | dict(left_out)
        run = infill if self.fills_masks else generate
        return run(model, self.prompts, trajectory=True, **settings)

    def canvas(self, number: int) -> Int[np.ndarray, "T"]:
        """Before the first call."""
        new = 0 if self.fills_masks else self.sampler.gen_length
        return np.array([*self.prompts[number], *[self.blank_id] * new], int)


def _read(
    model: Model,
    prompts: list[Prompt],
    tokenizer: Tokenizer | str | Path | None,
    settings: dict[str, Any],
) -> _Task:
    """Reads prompts and settings. Raises: InputError for [MASK] in some of the texts only."""
    for name in ("stop", "log_probs", "batch_size"):
        require(
            not settings.pop(name, None),
            f"{name} has no meaning in a replay, which keeps every call of all prompts; leave it "
            "out",
        )
    cfg, reader = model.config, open_reader(model.config, model.path, tokenizer)
    texts = reader.render(prompts, settings.get("chat", False))
    ids = [reader.tokenizer.encode(text) for text in texts]
    with_masks = [cfg.mask_id is not None and cfg.mask_id in one for one in ids]
    require(
        all(with_masks) or not any(with_masks),
        f"prompt {with_masks.index(True) if any(with_masks) else 0} has [MASK] and prompt "
        f"{with_masks.index(False) if not all(with_masks) else 0} none; watch them one by one",
    )
    if not any(with_masks):
        job = text_job(model, prompts, tokenizer=tokenizer, **settings)
        return _Task(reader.tokenizer, ids, job.sampler, job.sampler.blank_id(cfg), False)
    settings.pop("chat", None)
    known = field_hints(Confidence).keys() - {"gen_length"} | {"sampler"}
    for name in settings:
        hint = nearest(name, known)
        require(name in known, f"{name} has no meaning where [MASK] is filled{hint}")
    sampler = settings.pop("sampler", None)
    require(
        sampler is None or not settings,
        f"sampler= has its own {' and '.join(settings)}; set it there",
    )
    sampler = Confidence(1, **settings) if sampler is None else sampler
    return _Task(reader.tokenizer, ids, sampler, cfg.mask_id, True)


def _scene(
    task: _Task,
    number: int,
    names: Sequence[str],
    outs: Sequence[Generation],
    schedule: Schedule | None,
) -> Scene:
    canvas = task.canvas(number)
    start = max(len(canvas) - outs[0].log_probs.shape[1], 0)  # it may begin in the padding
    runs = tuple(
        run_of(out, number, name, canvas, None if name == FULL_DEPTH else schedule)
        for name, out in zip(names, outs, strict=True)
    )
    if task.fills_masks:  # an end of text inside a text ends nothing
        runs = tuple(dataclasses.replace(run, num_tokens=len(canvas) - start) for run in runs)
    blank = (canvas == task.blank_id) & (np.arange(len(canvas)) >= start)
    # Blocks of block diffusion count from the prompt's first token.
    taken = start % task.block_length if isinstance(task.sampler, BlockDiffusion) else 0
    return Scene(canvas, blank, start, start - taken, runs)


def run_name(left_out: Mapping[str, Any]) -> str:
    """What is left out, as a heading."""
    parts = []
    if "schedule" in left_out:
        parts.append(f"schedule {left_out['schedule']}")
    if "policy" in left_out:
        policy = left_out["policy"]
        policies = policy.values() if isinstance(policy, Mapping) else [policy]
        parts += [policy_name(one) for one in policies if one is not None]
    if "cache" in left_out:
        parts.append(type(left_out["cache"]).__name__)
    return ", ".join(parts) or FULL_DEPTH


def shown_settings(
    models: Mapping[str, Model], left_out: Mapping[str, Any], sampler: Sampler, seed: int
) -> dict[str, str]:
    """Names and values of all that the generation depends on but the prompts."""
    named = {f"model {letter}".strip(): repr(model) for letter, model in models.items()}
    values = {name: shown_value(value) for name, value in left_out.items()}
    versions = {"seed": str(seed), "dials_jax": dials_jax.__version__}
    return named | values | {"sampler": shown_value(sampler)} | versions


def shown_value(value: Any) -> str:
    """Settings as code, without those that have their defaults."""
    if isinstance(value, Mapping):
        return ", ".join(f"{letter}: {shown_value(one)}" for letter, one in value.items())
    parameters = getattr(type(value), "__dataclass_params__", None)
    if parameters is None or not parameters.repr or isinstance(value, Schedule):
        return str(value)  # it says itself how
    given = [
        f"{field.name}={getattr(value, field.name)!r}"
        for field in dataclasses.fields(value)
        if field.default is dataclasses.MISSING or getattr(value, field.name) != field.default
    ]
    return f"{type(value).__name__}({', '.join(given)})"


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """The text of one token; the name of a special one, and a number where there is none."""
    name = tokenizer.id_to_token(token)
    if name is None:
        return f"<{token}>"
    if tokenizer.is_added(token):
        return name
    text = tokenizer.decode([token]) or name
    return f" {text}" if name.startswith("▁") and not text.startswith(" ") else text
