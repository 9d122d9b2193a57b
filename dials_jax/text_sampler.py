"""How many tokens an answer has, and the sampler of a model's family that generates them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dials_jax.config import ModelConfig, as_type, typed
from dials_jax.config.typed import field_hints
from dials_jax.errors import nearest, require
from dials_jax.evaluation.harness import DEFAULT_LENGTH, SAMPLERS, make_sampler

MAX_BLOCK = 32  # tokens of a block where nothing says otherwise, as LLaDA is usually evaluated


@typed
def fitting_length(
    cfg: ModelConfig, longest: int, max_new_tokens: int | None, block_length: int | None = None
) -> int:
    """How many tokens to generate: by default, as many whole blocks as there is room for.

    Args:
      longest: tokens of the longest prompt.
    """
    room = cfg.max_length - longest
    require(
        room > 0,
        f"a prompt has {longest} tokens, and the model {cfg.max_length} positions for prompt and "
        "answer; shorten it",
    )
    require(
        max_new_tokens is None or max_new_tokens > 0,
        f"max_new_tokens={max_new_tokens} must be positive",
    )
    if max_new_tokens is not None:
        return max_new_tokens
    length = min(DEFAULT_LENGTH, room)
    if sampler_kind(cfg) != "confidence":  # the others need no whole blocks
        return length
    parts = min(block_length, length) if block_length else -(-length // MAX_BLOCK)
    return length - length % max(1, parts)


def check_lengths(
    cfg: ModelConfig, prompts: Sequence[Sequence[int]], gen_length: int, asked: int
) -> None:
    """Raises: InputError naming the first prompt that has no room for its answer."""
    whole = f" (in whole blocks {gen_length})" if gen_length != asked else ""
    for number, ids in enumerate(prompts):
        require(
            len(ids) + gen_length <= cfg.max_length,
            f"prompt {number} has {len(ids)} tokens, which with {asked} new ones{whole} are more "
            f"than the model's {cfg.max_length} positions; shorten it, or max_new_tokens",
        )


def text_sampler(cfg: ModelConfig, max_new_tokens: int, **settings: Any) -> Any:
    """The sampler of a model's family, for at least this many tokens.

    Causal models: `Autoregressive`; Dream: `Dream`; MDLM: `Ancestral`; block-causal models:
    `BlockDiffusion` in blocks of the model's length; others: `Confidence` in equal blocks of at
    most 32 tokens. Both end at the end of text. Blocks of another length, and steps, are rounded up
    until they fit; what is generated beyond `max_new_tokens` is cut.

    Raises: InputError for a setting that this sampler does not have, naming the nearest one.
    """
    kind = sampler_kind(cfg)
    for name in settings.keys() & {"block_length", "steps"}:
        settings[name] = as_type(int | None, settings[name], name)
    if kind == "block_diffusion":
        settings = block_settings(cfg, max_new_tokens, settings)
    fields = field_hints(SAMPLERS[kind])
    length_field = next(iter(fields))
    for name in settings:
        require(
            name in fields and name != length_field,
            f"{SAMPLERS[kind].__name__}, the sampler of this model ({cfg.model_type}), has no "
            f"setting {name!r}{nearest(name, fields.keys() - {length_field})}",
        )
    if kind == "confidence":
        settings |= whole_blocks(max_new_tokens, settings)
    else:
        settings[length_field] = max_new_tokens
    return make_sampler(kind, settings)


def sampler_kind(cfg: ModelConfig) -> str:
    """The name, in `SAMPLERS`, of the sampler that a model's family is published with."""
    if cfg.causal:
        return "autoregressive"
    if cfg.block_length is not None:
        return "block_diffusion"
    if cfg.model_type == "dream":
        return "dream"
    return "ancestral" if cfg.subs or cfg.time_conditioning else "confidence"


def block_settings(cfg: ModelConfig, length: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of `BlockDiffusion` as the model's family is published, with its own blocks.

    Models without a shift (SDAR) end with the block of their end of text, others at it.

    Args:
      settings: `steps` among them are those of the whole answer.
    """
    settings = {"stop_at_eos": cfg.right_shift} | settings
    if settings.get("block_length") is None:
        settings["block_length"] = cfg.block_length
    if not cfg.right_shift:
        ends = tuple(i for i in (cfg.eos_id, cfg.eot_id) if i is not None)
        settings.setdefault("stop_ids", ends)
    steps, block = settings.pop("steps", None), settings["block_length"]
    require(steps is None or steps > 0, f"steps={steps} must be positive")
    require(block > 0, f"block_length={block} must be positive")
    if steps is not None:
        settings.setdefault("steps_per_block", min(block, -(-steps // -(-length // block))))
    return settings


def whole_blocks(length: int, settings: dict[str, Any]) -> dict[str, int]:
    """Length, blocks and steps of `Confidence` that fit each other, for at least `length` tokens.

    Args:
      settings: may have block_length, and steps: those of the whole answer.
    """
    block, steps = settings.get("block_length"), settings.get("steps")
    for name, value in (("block_length", block), ("steps", steps)):
        require(value is None or value > 0, f"{name}={value} must be positive")
    count = -(-length // (block or MAX_BLOCK))
    block = min(block, length) if block else -(-length // count)
    per_block = block if steps is None else min(block, -(-steps // count))
    return {"gen_length": count * block, "block_length": block, "steps": count * per_block}
