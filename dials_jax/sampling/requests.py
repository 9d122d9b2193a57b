"""Checks of the arguments of `generate`, before anything is compiled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from dials_jax.caching.cache import Cache
from dials_jax.caching.plain import NoCache
from dials_jax.config import ModelConfig, shown
from dials_jax.data.tokenizer import Ids
from dials_jax.errors import InputError, nearest, require
from dials_jax.models.model import Model, check_shapes, check_vocabulary, require_model
from dials_jax.nn.policy import Policy, check_policy
from dials_jax.sampling.model_schedule import Schedule
from dials_jax.sampling.sampler import Sampler
from dials_jax.skipping.observing import Observer

ALONE = "M"  # the letter of a model that takes all steps


class Role(NamedTuple):
    """A model that takes some of the steps, and what it leaves out in them."""

    model: Model
    policy: Policy | None


def empty_prompts(num_sequences: int | None) -> Int[np.ndarray, "B 0"]:
    require(
        num_sequences is not None,
        "without prompts the number of sequences is open; give num_sequences",
    )
    require(num_sequences > 0, f"num_sequences={num_sequences} must be positive")
    return np.zeros((num_sequences, 0), np.int32)


def roles_of(
    model: Model | Mapping[str, Model],
    schedule: Schedule | None,
    policy: Policy | Mapping[str, Policy | None] | None,
) -> dict[str, Role]:
    """Every model with its policy, by letter.

    Raises: InputError for letters without a model, and for objects that are not models or policies.
    """
    several = isinstance(model, Mapping)
    require(
        several == (schedule is not None),
        "a schedule names models by letter; give both, as in {'L': light, 'H': heavy} and "
        "Schedule.parse('L125,H750,L125'), or neither",
    )
    models = dict(model) if several else {ALONE: model}
    policies = policy if isinstance(policy, Mapping) else dict.fromkeys(models, policy)
    for letter in policies:
        known = f"no model is called {letter!r}{nearest(str(letter), models)}"
        require(letter in models, f"policy: {known}")
    for letter in schedule.letters if schedule else ():
        known = f"no model is called {letter!r}{nearest(letter, models)}"
        require(letter in models, f"schedule {schedule}: {known}")
    for one in models.values():
        require_model(one)
    for one in policies.values():
        check_policy(one)
    return {letter: Role(one, policies.get(letter)) for letter, one in models.items()}


def check_schedule(
    roles: dict[str, Role], schedule: Schedule, sampler: Sampler, cache: Cache
) -> None:
    """Raises: InputError for models that cannot fill one canvas together."""
    require(
        sampler.takes_schedule,
        f"{type(sampler).__name__} has no denoising steps to divide; leave out `schedule`",
    )
    steps = sampler.count_steps(cache)
    require(
        schedule.num_steps == steps,
        f"schedule {schedule} has {schedule.num_steps} steps and the sampler {steps}; make them "
        "equal",
    )
    (letter, first), *others = ((letter, role.model) for letter, role in roles.items())
    for other, model in others:
        for name in ("vocab_size", "mask_id"):
            one, two = getattr(first.config, name), getattr(model.config, name)
            require(
                one == two,
                f"models {letter} and {other} have {name} {one} and {two}; a schedule needs models "
                "of one tokenizer",
            )
        require(
            first.mesh == model.mesh,
            f"models {letter} and {other} lie on different meshes; load them on the same",
        )
        require(
            first.batch_invariant == model.batch_invariant,
            f"of models {letter} and {other} one is batch-invariant; load both so, or none",
        )
    require(
        len(schedule.letters) == 1 or isinstance(cache, NoCache),
        "a cache holds one model's keys and values, of no use to another; leave out `cache`, or "
        "schedule one model",
    )


def check_arguments(
    sampler: object,
    cache: object,
    fill_to: int,
    log_probs: bool = False,
    trajectory: bool = False,
) -> None:
    """Raises: InputError for objects that are not samplers or caches, for an empty batch, and for
    records that a sampler does not keep."""
    _require_kind(sampler, Sampler, "sampler", "Confidence(gen_length=128)")
    _require_kind(cache, Cache, "cache", "DualCache()")
    require(fill_to > 0, f"fill_to={fill_to} must be positive")
    require(
        not log_probs or getattr(sampler, "gives_log_probs", False),
        f"{type(sampler).__name__} keeps no log-probabilities of tokens; leave out log_probs",
    )
    require(
        not trajectory or getattr(sampler, "gives_trajectory", False),
        f"{type(sampler).__name__} keeps no trajectory; leave out trajectory",
    )


def _require_kind(value: object, kind: type, what: str, example: str) -> None:
    """Raises: InputError for what has not all members of a protocol."""
    if isinstance(value, kind) and not isinstance(value, type):
        return
    names = [x for x in (*kind.__annotations__, *vars(kind)) if not x.startswith("_")]
    missing = [name for name in names if not hasattr(value, name)]
    has_some = not isinstance(value, type) and 0 < len(missing) < len(names)
    why = f" (it has no {', '.join(missing)})" if has_some else ""
    raise InputError(f"{what}={shown(value)} is no {what}{why}; give one, as {example}")


def check_observer(
    observer: Observer, roles: dict[str, Role], sampler: Sampler, cache: Cache
) -> None:
    """Raises: InputError where a call does not see every canvas once, and the whole of it."""
    require(isinstance(observer, Observer), f"observer={shown(observer)} is no Observer; give one")
    require(
        isinstance(cache, NoCache),
        f"an observer looks at whole canvases, which {type(cache).__name__} does not run; leave "
        "out `cache`",
    )
    require(
        sampler.cfg_scale == 0,
        "an observer looks at every canvas once, and guidance shows it twice; set cfg_scale=0",
    )
    require(
        not getattr(sampler, "append_blocks", False),
        "an observer looks at whole canvases, not at blocks that are appended; leave out "
        "append_blocks, or take another sampler",
    )
    require(len(roles) == 1, "an observer looks at one model; leave out the schedule's others")
    (role,) = roles.values()
    require(
        not role.model.config.causal,
        "a causal model decodes token by token; give its texts to `observe_texts`",
    )
    observer.check(role.model.num_layers)


def check_empty_prompts(
    cfg: ModelConfig,
    present: Bool[np.ndarray, "B P"],
    cache: Cache,
    numbers: Sequence[int] | None = None,
) -> None:
    """Where logits are shifted a token is predicted by the one to its left.

    Without any prompt the first token is predicted at its own position, as in `Model.apply`. Beside
    longer prompts, or in the window of a cache, that position would be padding or missing.

    Args:
      numbers: as of `check_prompts`.

    Raises: InputError for an empty prompt in these cases.
    """
    empty = np.flatnonzero(~present.any(axis=1))
    alone = present.shape[1] == 0 and isinstance(cache, NoCache)
    if cfg.right_shift and empty.size and not alone:
        raise InputError(
            f"prompt {_first_number(empty, numbers)} is empty, but this model predicts a token "
            "from the one before; begin it with a token such as end of text"
        )


def check_batch(
    cfg: ModelConfig,
    prompts: np.ndarray,
    valid: Bool[np.ndarray, "B P"] | None,
    sampler: Sampler,
    cache: Cache | None = None,
    policy: Policy | None = None,
    numbers: Sequence[int] | None = None,
) -> None:
    """Refuses prompts that the sampler cannot continue.

    Args:
      numbers: as of `check_prompts`.
    """
    present = check_prompts(cfg, prompts, valid, sampler.gen_length, numbers)
    check_empty_prompts(cfg, present, cache or NoCache(), numbers)
    sampler.check(cfg, present, policy, cache)


def check_prompts(
    cfg: ModelConfig,
    prompts: np.ndarray,
    valid: Bool[np.ndarray, "B P"] | None,
    gen_length: int,
    numbers: Sequence[int] | None = None,
) -> Bool[np.ndarray, "B P"]:
    """Refuses prompts that the sampler would silently corrupt; returns where they are real.

    Args:
      numbers: of the prompts, in messages; None: from 0.
    """
    check_shapes(cfg, prompts.shape, valid, "prompts")
    require(len(prompts) > 0, "there are no prompts; give at least one")
    present = np.ones(prompts.shape, bool) if valid is None else valid
    total = prompts.shape[1] + gen_length
    if total > cfg.max_length:
        longest = _first_number(np.argsort(-present.sum(axis=1)), numbers)
        raise InputError(
            f"{prompts.shape[1]} prompt tokens and gen_length={gen_length} make {total}, but the "
            f"model has {cfg.max_length} positions; shorten one of them (prompt {longest} is the "
            "longest)"
        )
    if (np.diff(present.astype(int), axis=1) < 0).any():
        raise InputError("prompts must be padded on the left: valid goes from True to False")
    check_vocabulary(cfg, prompts, present, "prompt", numbers)
    found = np.flatnonzero(((prompts == cfg.mask_id) & present).any(axis=1))
    if found.size:
        raise _mask_error(cfg, _first_number(found, numbers))
    return present


def refuse_masks(cfg: ModelConfig, prompts: Sequence[Ids]) -> None:
    """Raises: InputError for [MASK] in a prompt, as `check_prompts`, for prompts of any lengths."""
    for number, ids in enumerate(prompts):
        if cfg.mask_id in ids:
            raise _mask_error(cfg, number)


def _mask_error(cfg: ModelConfig, number: int) -> InputError:
    return InputError(
        f"prompt {number} contains [MASK] (id {cfg.mask_id}); remove it: masks in a prompt "
        "corrupt the quotas (dj.infill fills them)"
    )


def _first_number(found: Int[np.ndarray, "n"], numbers: Sequence[int] | None) -> int:
    return int(found[0]) if numbers is None else int(numbers[found[0]])
