"""What `train.py` and `eval.py` share: the command line and one-line errors."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax

from dials_jax.config import InputError, require

C = TypeVar("C")


def parse(config_class: type[C], description: str, argv: list[str] | None = None) -> tuple[C, Path]:
    """Reads `--config FILE --workdir DIR [--some.field value]`.

    FILE is Python with a function `get_config()`; every field of what it returns is an option,
    listed by `--config FILE --help`.
    """
    import argparse

    parser = argparse.ArgumentParser(
        description=description,
        add_help=False,
        epilog="Every field of the configuration is an option; --config FILE --help lists them.",
    )
    parser.add_argument("--config", metavar="FILE", help="a file of configs/, with get_config()")
    parser.add_argument(
        "--workdir", metavar="DIR", help="where results go; continues what is there"
    )
    parser.add_argument(
        "--distributed", action="store_true", help="join the other hosts of a pod before starting"
    )
    known, rest = parser.parse_known_args(argv)
    if known.config is None:
        parser.print_help()
        raise SystemExit(0 if {"-h", "--help"} & set(rest) or not rest else 2)
    config = override(load_config(known.config, config_class), rest, description)
    require(known.workdir is not None, "--workdir DIR is missing; say where results go")
    if known.distributed:
        jax.distributed.initialize()
    return config, Path(known.workdir)


def load_config(path: str, config_class: type[C]) -> C:
    """Runs a configuration file and returns what its `get_config()` returns."""
    require(
        Path(path).is_file(), f"configuration {path} is missing; configs/ lists those there are"
    )
    make = runpy.run_path(path).get("get_config")
    require(callable(make), f"configuration {path} has no function get_config()")
    config = make()
    require(
        isinstance(config, config_class),
        f"configuration {path} is a {type(config).__name__}, but this command takes a "
        f"{config_class.__name__}; use the other command",
    )
    return config


def override(config: C, arguments: list[str], description: str = "") -> C:
    """The configuration with `--some.field value` applied."""
    if not arguments:
        return config
    import tyro

    return tyro.cli(
        type(config),
        default=config,
        args=arguments,
        description=description,
        config=(tyro.conf.AvoidSubcommands,),
    )


def main(command: Callable[[], Any]) -> None:
    """Runs a command; what the user got wrong becomes one line and exit status 2."""
    try:
        command()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("stopped; the same command continues from the last checkpoint", file=sys.stderr)
        raise SystemExit(130) from None
