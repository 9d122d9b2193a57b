"""Reads numbers and options from a published `config.json`; null counts as absent.

Every function that reads raises InputError, naming the option, for a value of another kind.
"""

from __future__ import annotations

from typing import Any

from dials_jax.config import ModelConfig
from dials_jax.errors import require


def require_options(values: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises: InputError unless every option has its `wanted` value, the only one implemented."""
    for name, only in wanted.items():
        given = values.get(name)
        require(
            given is not None or not only,
            f"config.json: {name} is missing; only {only!r} is implemented",
        )
        require(
            (False if given is None else given) == only,
            f"config.json: {name}={given!r} is not implemented; only {only!r} is",
        )


def integer(values: dict[str, Any], name: str, default: int | None = None) -> int:
    """Reads an integer; without it or a `default`, raises InputError."""
    value = default if values.get(name) is None else values[name]
    require(value is not None, f"config.json: {name} is missing; add it")
    whole = isinstance(value, int) and not isinstance(value, bool)
    require(whole, f"config.json: {name}={value!r} must be an integer")
    require(abs(value) < 2**31, f"config.json: {name}={value} is too large")
    return value


def number(values: dict[str, Any], name: str) -> float:
    """Reads a finite number."""
    value = values.get(name)
    real = isinstance(value, int | float) and not isinstance(value, bool)
    require(
        real and abs(value) < 1e300,
        f"config.json: {name}={value!r} must be a finite number; correct it",
    )
    return float(value)


def flag(values: dict[str, Any], name: str, default: bool = False) -> bool:
    """Reads true or false."""
    value = default if values.get(name) is None else values[name]
    require(isinstance(value, bool), f"config.json: {name}={value!r} must be true or false")
    return value


def section(values: dict[str, Any], name: str) -> dict[str, Any]:
    """Reads an object inside the configuration; an empty dict if it is absent."""
    value = {} if values.get(name) is None else values[name]
    require(isinstance(value, dict), f"config.json: {name}={value!r} must be an object")
    return value


def token_id(values: dict[str, Any], name: str, default: int | None = None) -> int | None:
    """Reads the id of a special token; the `default` if it is absent."""
    return default if values.get(name) is None else integer(values, name)


def integers(values: dict[str, Any], names: dict[str, str]) -> dict[str, int]:
    """Reads fields of `ModelConfig`; `names` maps each to the option that states it."""
    return {field: integer(values, option) for field, option in names.items()}


def stated(cfg: ModelConfig, names: dict[str, str]) -> dict[str, Any]:
    """The inverse of `integers`."""
    return {option: getattr(cfg, field) for field, option in names.items()}


def derive_head_dim(values: dict[str, Any], width: str, heads: str) -> int:
    """Divides the model's width by the number of heads.

    Args:
      width: the option with the width of the model.
      heads: the option with the number of heads.
    """
    d_model, num_heads = integer(values, width), integer(values, heads)
    require(
        d_model > 0 and num_heads > 0 and d_model % num_heads == 0,
        f"config.json: {width}={d_model} must be a positive multiple of {heads}={num_heads}",
    )
    return d_model // num_heads
