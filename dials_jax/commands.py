"""Command lines with a configuration, and errors in one line.

JAX takes a second to import, so nothing here does before it is needed: `--help` is there at once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import os
import re
import signal
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, TypeVar

from dials_jax.buckets import check_address
from dials_jax.config.choices import apply_choices, choice_flags
from dials_jax.config_files import load_config, shipped_configs
from dials_jax.errors import InputError, require
from dials_jax.files import local_path
from dials_jax.stopping import SIGNALS, Stopped, obey_sigterm, sending_again

C = TypeVar("C")


class Hosts(NamedTuple):
    """The processes of a run, where nothing on the machine names them.

    Attributes:
      coordinator: HOST:PORT of the first process, which the others reach there.
    """

    coordinator: str
    num_processes: int
    process_index: int

    @classmethod
    def of(cls, options: argparse.Namespace) -> Hosts | None:
        """Those of the options. Raises: InputError unless all of them are given, or none."""
        given = {name: vars(options).get(name) for name in cls._fields}
        missing = [f"--{n.replace('_', '-')}" for n, x in given.items() if x is None]
        if len(missing) == len(given):
            return None
        require(
            not missing,
            f"{' and '.join(missing)} missing; the processes of a run are named by --coordinator "
            "HOST:PORT, --num-processes N and --process-index I, all three",
        )
        hosts = cls(**given)
        host, _, port = hosts.coordinator.rpartition(":")
        require(
            bool(host) and port.isdecimal() and 0 < int(port) < 2**16,
            f"--coordinator={hosts.coordinator} is no HOST:PORT; give one such as node001:5005",
        )
        require(
            0 <= hosts.process_index < hosts.num_processes,
            f"--process-index={hosts.process_index} must lie in 0 to {hosts.num_processes - 1}, "
            f"one less than --num-processes={hosts.num_processes}",
        )
        return hosts


@dataclasses.dataclass(frozen=True)
class CommandLine:
    """`--config FILE --workdir DIR [--some.field value]`, as it was given.

    Attributes:
      hosts: the processes of the run, if options name them.
      compile_for: the pod to compile for, in place of running; None: run.
      mirror: where in a bucket a copy of the workdir is kept; None: nowhere.
      rest: the options of the configuration.
    """

    description: str
    config: str
    workdir: str | None
    distributed: bool
    hosts: Hosts | None
    compile_for: str | None
    mirror: str | None
    rest: list[str]

    @classmethod
    def read(
        cls, description: str, argv: list[str] | None = None, needs_workdir: bool = True
    ) -> CommandLine:
        """Reads the options. Help without a configuration ends the process here."""
        parser = config_parser(description, needs_workdir)
        known, rest = parser.parse_known_args(argv)
        if known.config is None:
            asked = {"-h", "--help"} & set(rest) or not (rest or any(vars(known).values()))
            require(bool(asked), "--config FILE is missing; name a file, or one of configs/")
            parser.print_help()
            raise SystemExit(0)
        workdir, distributed = vars(known).get("workdir"), vars(known).get("distributed", False)
        compile_for, mirror = vars(known).get("compile_for"), vars(known).get("mirror")
        if workdir is not None:
            local_path(workdir, "--workdir")
        if mirror is not None:
            check_address(mirror, "--mirror")
        hosts = Hosts.of(known)
        return cls(
            description, known.config, workdir, distributed, hosts, compile_for, mirror, rest
        )

    def settings(self, config_class: type[C] | UnionType) -> C:
        """The configuration with its options applied."""
        return override(load_config(self.config, config_class), self.rest, self.description)

    def folder(self) -> Path:
        """The workdir. Joins the other hosts of a pod first, if that is asked for."""
        require(self.workdir is not None, "--workdir DIR is missing; say where results go")
        if self.distributed or self.hosts:
            _join(self.hosts)
        return Path(self.workdir).expanduser()

    @contextlib.contextmanager
    def open_workdir(self) -> Iterator[Path]:
        """The workdir, as `folder`; if that is asked for, with a copy in a bucket."""
        workdir = self.folder()
        if self.mirror is None:
            yield workdir
        else:
            from dials_jax.mirror import mirrored

            with mirrored(workdir, self.mirror):
                yield workdir


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
    given = CommandLine.read(description, argv, needs_workdir)
    config = given.settings(config_class)
    return config, given.folder() if needs_workdir else Path(".")


def config_parser(description: str, needs_workdir: bool) -> argparse.ArgumentParser:
    names = textwrap.fill(", ".join(shipped_configs()), 96, break_on_hyphens=False)
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
        epilog="Every field of the configuration is an option; --config FILE --help lists them.\n"
        "Compiled programs are in ~/.cache/dials_jax/xla, or in $JAX_COMPILATION_CACHE_DIR;\n"
        "JAX_ENABLE_COMPILATION_CACHE=false keeps none.\n\n"
        f"Configurations that come with the library, for training and evaluation:\n{names}",
    )
    parser.add_argument(
        "--config", metavar="FILE", help="a file with get_config(), or the name of a shipped one"
    )
    if needs_workdir:
        parser.add_argument(
            "--workdir", metavar="DIR", help="where results go; continues what is there"
        )
        parser.add_argument(
            "--mirror", metavar="ADDRESS", help="keep a copy of it there: gs://bucket/run, s3://..."
        )
        parser.add_argument(
            "--distributed",
            action="store_true",
            help="join the other hosts of a pod before starting",
        )
        group = parser.add_argument_group("the processes of a run, where nothing names them")
        group.add_argument("--coordinator", metavar="HOST:PORT", help="of the first process")
        group.add_argument("--num-processes", type=int, metavar="N", help="in all")
        group.add_argument("--process-index", type=int, metavar="I", help="of this one, from 0")
        parser.add_argument(
            "--compile-for", metavar="POD", help="run nothing: say what it takes of v5e:16x16, ..."
        )
    return parser


def _join(hosts: Hosts | None) -> None:
    """Joins the other processes. Args: hosts: None: those that the machine's environment names."""
    import jax

    try:
        if hosts is None:
            jax.distributed.initialize()
        else:  # nothing is detected beside them
            jax.distributed.initialize(*hosts, cluster_detection_method="deactivate")
    except ValueError as error:  # nothing names the other hosts
        raise InputError(
            f"--distributed finds no other hosts ({error}); leave it out on a single one, or name "
            "them by --coordinator, --num-processes and --process-index"
        ) from error
    except RuntimeError as error:
        raise InputError(
            f"the other hosts cannot be joined ({_first_line(error)}); start the command on all of "
            "them, and let them reach the first one"
        ) from error
    obey_sigterm()  # JAX sets its own handler, which nothing here uses


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


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
    return f"{blocks[0] if blocks else title}; {_hint(words)}"


def _hint(words: str) -> str:
    """What to do about an error of tyro, whose hints know no switches."""
    unknown = words.partition("Unrecognized options: ")[2]
    if turned_off := re.match(r"--no-([\w.-]+)\.([\w-]+)", unknown):
        return f"did you mean --{turned_off[1]}.no-{turned_off[2]}?"
    if re.match(r"(True|False)\b", unknown):
        return "a switch has no value: --part.name turns it on, --part.no-name off"
    close = re.search(r"Perhaps you meant: (--[\w.-]+)", words)
    return f"did you mean {close[1]}?" if close else "--help lists all options"


def keep_programs() -> None:
    """Stores programs that take a second or more to compile on disk, for the next run.

    Call it before anything is compiled. JAX's variables take precedence: JAX_COMPILATION_CACHE_DIR
    names another folder, JAX_ENABLE_COMPILATION_CACHE=false stores nothing.
    """
    import jax

    if not jax.config.jax_compilation_cache_dir:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(home) / "dials_jax" / "xla"))
    # Before jax 0.11 the key of a program held the path of XLA's own cache, a folder in this one,
    # on every backend: no program was found again in a folder that had been moved or copied.
    xla_caches = "jax_persistent_cache_enable_xla_caches"
    if jax.__version_info__ < (0, 11) and xla_caches.upper() not in os.environ:
        jax.config.update(xla_caches, "")


def run_command(command: Callable[[], Any]) -> None:
    """Runs a command; errors of the user become one line and exit status 2.

    Ctrl-C and SIGTERM become a line that says what is saved, and status 130 and 143. A file that
    cannot be read or written, for example on a full disk, becomes a line and status 1.
    """
    obey_sigterm()
    try:
        with sending_again():
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
        # What the signal met in Orbax will never be awaited, and Python would say so at the end.
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        print(f"stopped{stop.message and ': '}{stop.message}", file=sys.stderr)
        raise SystemExit(stop.status) from None


def run_as_process(command: Callable[[], Any]) -> None:
    """`run_command` as all that a process does: after Ctrl-C or SIGTERM it is over at once.

    XLA may still compile in threads of its own. At the end of Python it would be waited for, and
    now and then the process crashed in it, with another status. Processes that have joined others
    take their leave.
    """
    try:
        run_command(command)
    except SystemExit as end:
        joined = getattr(sys.modules.get("jax.distributed"), "is_initialized", bool)
        if end.code not in [Stopped(signum=signum).status for signum in SIGNALS] or joined():
            raise
        for signum in SIGNALS:  # another one would begin all this anew
            signal.signal(signum, signal.SIG_IGN)
        for stream in (sys.stdout, sys.stderr):
            # A reader may have gone, and a stream that was closed from the start is None.
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(end.code)
