"""The command line of `train.py` and `eval.py`, and errors in one line."""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import re
import runpy
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args

import jax

import dials_jax.config
from dials_jax.config.choices import apply_choices, choice_flags
from dials_jax.errors import InputError, nearest, require, require_packages
from dials_jax.files import local_path
from dials_jax.stopping import Stopped, obey_sigterm

C = TypeVar("C")


def parse(
    config_class: type[C] | UnionType,
    description: str,
    argv: list[str] | None = None,
    needs_workdir: bool = True,
) -> tuple[C, Path]:
    """Reads `--config FILE --workdir DIR [--some.field value]`.

    FILE is Python with a function `get_config()`; every field of what it returns is an option,
    listed by `--config FILE --help`.
    """
    import argparse

    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
        epilog="Every field of the configuration is an option; --config FILE --help lists them.\n"
        "Compiled programs are in ~/.cache/dials_jax/xla, or in $JAX_COMPILATION_CACHE_DIR;\n"
        "JAX_ENABLE_COMPILATION_CACHE=false keeps none.",
    )
    parser.add_argument("--config", metavar="FILE", help="a file of configs/, with get_config()")
    if needs_workdir:
        parser.add_argument(
            "--workdir", metavar="DIR", help="where results go; continues what is there"
        )
        parser.add_argument(
            "--distributed",
            action="store_true",
            help="join the other hosts of a pod before starting",
        )
    known, rest = parser.parse_known_args(argv)
    if known.config is None:
        asked = {"-h", "--help"} & set(rest) or not (rest or any(vars(known).values()))
        require(bool(asked), "--config FILE is missing; name a file of configs/")
        parser.print_help()
        raise SystemExit(0)
    config = override(load_config(known.config, config_class), rest, description)
    if not needs_workdir:
        return config, Path(".")
    require(known.workdir is not None, "--workdir DIR is missing; say where results go")
    local_path(known.workdir, "--workdir")
    if known.distributed:
        _join()
    return config, Path(known.workdir).expanduser()


def _join() -> None:
    try:
        jax.distributed.initialize()
    except ValueError as error:  # nothing names the other hosts
        raise InputError(
            f"--distributed finds no other hosts ({error}); leave it out on a single one, or start "
            "the command on every host of a pod"
        ) from error
    obey_sigterm()  # JAX sets its own handler, which nothing here uses


def load_config(path: str, config_class: type[C] | UnionType) -> C:
    """Runs a configuration file and returns what its `get_config()` returns.

    Raises: InputError for anything that goes wrong in it, with the line.
    """
    file = local_path(path, "--config")
    require(file.is_file(), f"configuration {path} is missing; configs/ lists those there are")
    make = None
    try:
        make = runpy.run_path(str(file)).get("get_config")
        require(callable(make), "it has no function get_config()")
        config = make()
    except (Exception, SystemExit) as error:
        where = f"configuration {path}{_line(str(file), error, make)}"
        raise InputError(f"{where}: {_reason(error)}") from error
    taken = " or ".join(c.__name__ for c in get_args(config_class) or (config_class,))
    require(
        isinstance(config, config_class),
        f"configuration {path} is a {type(config).__name__}, but this command takes a {taken}; "
        "use the other command",
    )
    return config


def _line(file: str, error: BaseException, make: Any) -> str:
    """Where in the file an error arose."""
    if isinstance(error, SyntaxError) and error.filename == file:
        return f", line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == file]
    if not lines and inspect.isfunction(make):  # it needs an argument
        lines = [make.__code__.co_firstlineno]
    return f", line {lines[-1]}" if lines else ""


def _reason(error: BaseException) -> str:
    """An error of a configuration file in one line."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, SystemExit):
        return "it calls exit; a configuration only returns settings"
    message = " ".join(str(error).split())
    if isinstance(error, TypeError):
        message += _field_hint(message)
    return f"{type(error).__name__}: {message}"


def _field_hint(message: str) -> str:
    """The remedy for a field that a class of `dials_jax.config` does not have, or lacks."""
    match = re.match(r"(\w+)\.__init__\(\) (?:.*unexpected.*'(\w+)'|missing)", message)
    config_class = match and (
        getattr(dials_jax.config, match[1], None) or getattr(dials_jax, match[1], None)
    )
    if not config_class:
        return ""
    fields = getattr(config_class, "__dataclass_fields__", ())
    return nearest(match[2], fields) if match[2] else "; add it"


def override(config: C, arguments: list[str], description: str = "") -> C:
    """The configuration with `--some.field value` applied.

    A field that is one of several dataclasses is given whole, as Python writes it:
    `--tasks.0.sampler 'Dream(max_new_tokens=64, steps=32)'`. Then its own fields are options too.
    """
    if not arguments:
        return config
    for argument in arguments:
        _require_current_name(config, argument)
    import tyro

    config, arguments = apply_choices(config, arguments)
    for flag, classes in choice_flags(config):
        names = ", ".join(cls.__name__ for cls in classes)
        description += f"\n\n{flag} 'NAME(field=value, ...)' is one of {names}."

    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            return tyro.cli(
                type(config),
                default=config,
                args=arguments,
                description=description,
                config=(tyro.conf.AvoidSubcommands,),
            )
    except SystemExit as stop:
        if stop.code:  # not --help
            raise InputError(_unframed(message.getvalue())) from None
        raise


def _require_current_name(config: Any, argument: str) -> None:
    """Raises: InputError for `--some.field` by the name that it had in an earlier version."""
    if not argument.startswith("--"):
        return
    *parents, name = argument[2:].partition("=")[0].replace("-", "_").split(".")
    for parent in parents:
        if isinstance(config, tuple) and parent.isdigit() and int(parent) < len(config):
            config = config[int(parent)]
        else:
            config = getattr(config, parent, None)
    prefix = "".join(f"{parent}." for parent in parents)
    new = getattr(config, "RENAMED", {}).get(name.removeprefix("no_"))
    require(
        new is None,
        f"--{prefix}{name} of {type(config).__name__} is now --{prefix}{new}; rename it",
    )


def _unframed(message: str) -> str:
    """One line from tyro's framed error, with or without Unicode: a title, the message, a hint."""
    words = " ".join(re.sub("[│╭╮╰╯]", " ", message).split())
    title, *blocks = re.split(r" ?[─-]{3,} ?", words)
    close = re.search(r"Perhaps you meant: (--[\w.-]+)", words)
    hint = f"did you mean {close[1]}?" if close else "--help lists all options"
    return f"{blocks[0] if blocks else title}; {hint}"


def keep_programs() -> None:
    """Stores programs that take a second or more to compile on disk, for the next run.

    Call it before anything is compiled. JAX's variables take precedence: JAX_COMPILATION_CACHE_DIR
    names another folder, JAX_ENABLE_COMPILATION_CACHE=false stores nothing.
    """
    if not jax.config.jax_compilation_cache_dir:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(home) / "dials_jax" / "xla"))


def run_command(command: Callable[[], Any]) -> None:
    """Runs a command; errors of the user become one line and exit status 2.

    Ctrl-C and SIGTERM become a line that says what is saved, and status 130 and 143. A file that
    cannot be read or written, for example on a full disk, becomes a line and status 1.
    """
    obey_sigterm()
    try:
        command()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        what = error.strerror or str(error).partition("\n")[0]
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{what}; what was saved before stays", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt as stop:
        stop = stop if isinstance(stop, Stopped) else Stopped()
        print(f"stopped{stop.message and ': '}{stop.message}", file=sys.stderr)
        raise SystemExit(stop.status) from None


def lm_eval_command() -> None:
    """`dials-lm-eval`: the command line of lm-evaluation-harness, with `--model dials`."""
    require_packages("eval", "lm_eval")
    keep_programs()
    from lm_eval.__main__ import cli_evaluate

    import dials_jax.evaluation.lm_eval  # noqa: F401  registers the model

    run_command(cli_evaluate)
