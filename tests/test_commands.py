import errno
import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from dials_jax.caching.early_skip.settings import EarlySkip
from dials_jax.caching.plain import DualCache
from dials_jax.commands import keep_programs, parse, run_command
from dials_jax.config import EvalConfig, TaskData, TrainConfig
from dials_jax.errors import InputError
from dials_jax.sampling.dream import Dream
from dials_jax.stopping import Stopped

ROOT = Path(__file__).parents[1]

CONFIG = """
from dials_jax.config import ArithmeticData, OptimizerConfig, TrainConfig

def get_config():
    optimizer = OptimizerConfig(num_steps=10, warmup_steps=1)
    return TrainConfig(backbone="model", data=ArithmeticData(), optimizer=optimizer)
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    return str(path)


def parsed(config, *arguments):
    return parse(TrainConfig, "Trains.", ["--config", config, "--workdir", "run", *arguments])


def test_the_file_decides_and_flags_override(config):
    plain, workdir = parsed(config)
    assert (plain.batch_size, plain.optimizer.num_steps, str(workdir)) == (64, 10, "run")
    cfg, _ = parsed(config, "--batch-size", "8", "--optimizer.num-steps", "3", "--data.digits", "1")
    assert (cfg.batch_size, cfg.optimizer.num_steps, cfg.data.digits) == (8, 3, 1)
    assert cfg.backbone == "model" and cfg.optimizer.warmup_steps == 1


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--no-data.skip"], r"did you mean --data.no-skip\?"),
        (["--objective.scale-skip-by-mask-ratio", "False"], "a switch has no value"),
        (["--optimizer.num-step", "3"], r"did you mean --optimizer.num-steps\?"),
    ],
)
def test_wrong_options_have_a_remedy(config, arguments, hint):
    with pytest.raises(InputError, match=hint):
        parsed(config, *arguments)


EVALUATION = """
from dials_jax.config import *

def get_config():
    task = EvalTask(name="sums", metric="exact_match", data=ArithmeticData())
    return EvalConfig(model="model", tasks=(task,))
"""


@pytest.fixture
def evaluated(tmp_path):
    """Reads arguments for a sweep of one task, which names no sampler and no cache."""
    path = tmp_path / "sweep.py"
    path.write_text(EVALUATION)

    def read(*arguments):
        argv = ["--config", str(path), "--workdir", "run", *arguments]
        return parse(EvalConfig, "Evaluates.", argv)[0]

    return read


def test_a_sampler_and_a_cache_are_chosen_by_flags(evaluated):
    assert evaluated().tasks[0].sampler is evaluated().tasks[0].cache is None
    chosen = ["--tasks.0.sampler", "Dream(8, alg='origin')", "--tasks.0.cache=EarlySkip(alpha=0.3)"]
    more = ["--tasks.0.sampler.temperature", "0.5", "--tasks.0.cache.block-every", "2"]
    task = evaluated(*chosen, *more, "--batch-size", "3").tasks[0]
    assert task.sampler == Dream(8, alg="origin", temperature=0.5)
    assert task.cache == EarlySkip(alpha=0.3, block_every=2)
    assert evaluated(*chosen, "--tasks.0.cache", "None").tasks[0].cache is None
    assert evaluated("--tasks.0.cache", "DualCache").tasks[0].cache == DualCache()
    data = evaluated("--tasks.0.data", "TaskData(paths=('a.jsonl',))").tasks[0].data
    assert data == TaskData(paths=("a.jsonl",))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--tasks.0.sampler.steps", "3"],
            r"--tasks.0.sampler is None; choose one of Confidence, ",
        ),
        (["--tasks.0.sampler", "Dreem(8)"], "'Dreem' is not known; did you mean 'Dream'"),
        (["--tasks.0.sampler", "Dream(8, stepz=2)"], "did you mean 'steps'"),
        (["--tasks.0.sampler", "Dream()"], "missing .*'max_new_tokens'; give each field"),
        (["--tasks.0.sampler", "Dream(8, steps=0)"], "steps=0 must be positive"),
        (
            ["--tasks.0.sampler", "Dream(8"],
            r"give Confidence\(field=value, ...\), in quotes",
        ),
        (["--tasks.0.sampler", "Dream(exit())"], "give Confidence"),
        (["--tasks.0.cache"], "give PrefixCache"),
    ],
)
def test_a_wrong_choice_is_refused_in_one_line(evaluated, arguments, message):
    with pytest.raises(InputError, match=message) as error:
        evaluated(*arguments)
    assert "\n" not in str(error.value)


def test_help_lists_what_a_field_may_be(evaluated, capsys):
    with pytest.raises(SystemExit):
        evaluated("--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert "--tasks.0.sampler 'NAME(field=value, ...)' is one of Confidence, Dream," in shown


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--batch-sise", "3"], "--batch-sise.*--batch-size"),
        (["--optimizer.num-step", "3"], "--optimizer.num-step.*--optimizer.num-steps"),
        (["--batch-size", "seven"], "--batch-size.*seven"),
        (["--batch-size", "7", "--num-microbatches", "2"], "batch_size=7 must be divisible"),
        (["--optimizer.schedule", "constant"], "^--optimizer.schedule .* --optimizer.lr_schedule;"),
        (["--router.threshold=0.3"], "^--router.threshold of RouterConfig .*router.skip_threshold"),
        (["--no-unrolled"], "^--no_unrolled of TrainConfig is now --layout; rename it"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(config, arguments, message):
    with pytest.raises(InputError, match=message) as error:
        parsed(config, *arguments)
    assert "\n" not in str(error.value)


def test_wrong_files_are_refused(config, tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.py is missing"):
        parsed(str(tmp_path / "nowhere.py"))
    empty = tmp_path / "empty.py"
    empty.write_text("")
    with pytest.raises(InputError, match=r"has no function get_config"):
        parsed(str(empty))
    with pytest.raises(
        InputError, match="is of class TrainConfig, but this command takes EvalConfig"
    ):
        parse(EvalConfig, "Evaluates.", ["--config", config, "--workdir", "run"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import sys\nsys.exit(3)", "line 2: it calls exit"),
        ("def get_config():\n  raise SystemExit", "line 2: it calls exit"),
        ("\n\nimport no_such_package", "line 3: ModuleNotFoundError: No module named 'no_such_"),
        ("from dials_jax.config import TrainConfi", "line 1: ImportError: cannot import name"),
        ("x = 1\ndef get_config(:\n", "line 2: SyntaxError: "),
        ("x = '\0'", "SyntaxError: "),
        ("\ndef get_config(size): pass", "line 2: TypeError: get_config.. missing 1 required"),
        ("def get_config():\n  return 1 / 0", "line 2: ZeroDivisionError: division by zero"),
        ("def get_config():\n  return get_config()", "line 2: RecursionError: "),
        ("import os\nW = os.environ['NOT_SET_HERE']", "line 2: KeyError: 'NOT_SET_HERE'"),
        ("get_config = 3", "it has no function get_config"),
        (
            "from dials_jax.config import *\ndef get_config():\n  return RouterConfig(\n"
            "    d_hiden=3)",
            "line 3: TypeError: RouterConfig.*d_hiden.*; did you mean 'd_hidden'",
        ),
        (
            "from dials_jax.config import *\ndef get_config():\n  return EvalTask(name='x')",
            "line 3: TypeError: EvalTask.* missing 2 required .*; add it",
        ),
        (
            "from dials_jax.config import *\ndef get_config():\n  MeshConfig(data=0)",
            "line 3: mesh .0, 1, 1.: sizes are positive or -1",
        ),
    ],
)
@pytest.mark.usefixtures("untyped")  # which would check the fields first
def test_what_goes_wrong_in_a_configuration_file_is_one_line(tmp_path, text, message):
    path = tmp_path / "c.py"
    path.write_text(text)
    with pytest.raises(InputError, match=rf"^configuration \S+c\.py(, |: ){message}") as error:
        parsed(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", ["a" * 300, "~nobody_of_this_name/c.py", "\0", "a\udcff.py", ""])
def test_a_configuration_that_no_file_can_be_called(path):
    with pytest.raises(InputError, match="--config") as error:
        parsed(path)
    assert "\n" not in str(error.value) and str(error.value).isprintable()


def test_missing_arguments_are_named(config):
    with pytest.raises(InputError, match="--workdir DIR is missing"):
        parse(TrainConfig, "Trains.", ["--config", config])
    for arguments in (["--workdir", "run"], ["--cofnig", config], ["--distributed"]):
        with pytest.raises(InputError, match="--config FILE is missing"):
            parse(TrainConfig, "Trains.", arguments)


@pytest.mark.parametrize("option", [["--workdir", "run"], ["--distributed"]])
def test_a_command_without_a_workdir_takes_no_such_options(config, option):
    with pytest.raises(InputError, match=option[0]):
        parse(TrainConfig, "Prepares.", ["--config", config, *option], needs_workdir=False)
    assert parse(TrainConfig, "Prepares.", ["--config", config], needs_workdir=False)


def test_hosts_that_cannot_be_found_are_one_line(config, monkeypatch):
    def initialize():
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(InputError, match="--distributed finds no other hosts"):
        parsed(config, "--distributed")


HOSTS = ["--coordinator", "node001:5005", "--num-processes", "4", "--process-index", "2"]


def test_hosts_that_options_name_are_joined_without_looking_for_others(config, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: calls.append((a, k)))
    parsed(config, *HOSTS)
    assert calls == [(("node001:5005", 4, 2), {"cluster_detection_method": "deactivate"})]
    parsed(config)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (slice(0, 2), "--coordinator missing; the processes of a run are named by"),
        (slice(2, 6), "--num-processes and --process-index missing"),
        (("node001", 1), "--coordinator=node001 is no HOST:PORT; give one such as node001:5005"),
        (("node001:70000", 1), "--coordinator=node001:70000 is no HOST:PORT"),
        (("4", 5), "--process-index=4 must lie in 0 to 3"),
        (("-1", 5), "--process-index=-1 must lie in 0 to 3"),
    ],
)
def test_hosts_that_options_name_badly_are_refused_before_any_work(config, change, message):
    options = list(HOSTS)
    if isinstance(change, slice):
        del options[change]
    else:
        options[change[1]] = change[0]
    with pytest.raises(InputError, match=re.escape(message)) as error:
        parsed(config, *options)
    assert "\n" not in str(error.value)


def test_hosts_that_do_not_answer_are_one_line(config, monkeypatch):
    def initialize(*hosts, **how):
        raise RuntimeError("DEADLINE_EXCEEDED: barrier timed out\nmore")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(InputError, match=r"joined \(DEADLINE_EXCEEDED: barrier timed out\);"):
        parsed(config, *HOSTS)


def test_help_says_how_to_list_every_field(config, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(TrainConfig, "Trains.\n\npython train.py --config FILE\n", ["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 0 and "python train.py --config FILE" in lines
    with pytest.raises(SystemExit) as stop:
        parse(TrainConfig, "Trains.", ["--config", config, "--help"])
    assert stop.value.code == 0 and "--optimizer.learning-rate" in capsys.readouterr().out


@pytest.mark.parametrize(
    "problem, code, line",
    [
        (InputError("x is wrong; do y"), 2, "error: x is wrong; do y\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "run/metrics.jsonl"),
            1,
            "error: run/metrics.jsonl: No space left on device; what was saved before stays\n",
        ),
        (KeyboardInterrupt(), 130, "stopped\n"),
        (Stopped("step 3 is saved", signal.SIGTERM), 143, "stopped: step 3 is saved\n"),
    ],
)
def test_a_command_ends_with_one_line_and_no_traceback(capsys, problem, code, line):
    def command():
        raise problem

    with pytest.raises(SystemExit) as stop:
        run_command(command)
    assert stop.value.code == code and stop.value.__suppress_context__
    assert capsys.readouterr().err == line


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 / 0)


RUN = """
from dials_jax.commands import keep_programs
keep_programs()
import jax
from dials_jax.compiling import Timed

misses = []
jax.monitoring.register_event_listener(lambda e, **_: misses.append(e) if "miss" in e else None)
out, _ = Timed(lambda x: jax.numpy.sin(x) @ x)(jax.numpy.ones((3, 3)))
print(float(out.sum()), len(misses))
"""


def test_the_next_process_finds_the_programs_of_the_last_also_in_a_copied_folder(tmp_path):
    def run(home):
        env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
        env |= {"XDG_CACHE_HOME": str(home), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        env["PYTHONPATH"] = str(Path(__file__).parents[1])
        command = [sys.executable, "-c", RUN]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        value, num_misses = done.stdout.split()
        files = {path.relative_to(home) for path in home.rglob("*") if path.is_file()}
        return value, int(num_misses), files

    value, num_misses, programs = run(tmp_path / "first")
    assert 0 < num_misses <= len(programs)
    assert {path.parent for path in programs} == {Path("dials_jax/xla")}
    (tmp_path / "first").rename(tmp_path / "second")
    assert run(tmp_path / "second") == (value, 0, programs)


@pytest.mark.parametrize("version, of_xla", [((0, 10, 2), ""), ((0, 11, 0), "as it was")])
def test_what_xla_keeps_beside_them_is_left_out_where_its_folder_is_in_every_key(
    version, of_xla, monkeypatch
):
    name = "jax_persistent_cache_enable_xla_caches"
    before, folder = getattr(jax.config, name), jax.config.jax_compilation_cache_dir
    monkeypatch.setattr(jax, "__version_info__", version)
    monkeypatch.delenv(name.upper(), raising=False)
    try:
        jax.config.update(name, "as it was")
        keep_programs()
        assert getattr(jax.config, name) == of_xla
        monkeypatch.setenv(name.upper(), "as it was")
        jax.config.update(name, "as it was")
        keep_programs()
        assert getattr(jax.config, name) == "as it was"  # a user's variable comes first
    finally:
        jax.config.update(name, before)
        jax.config.update("jax_compilation_cache_dir", folder)


@pytest.mark.parametrize("given, used", [(None, "cache/dials_jax/xla"), ("mine", "mine")])
def test_programs_are_kept_in_the_folder_that_jax_is_given(given, used, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", given and str(tmp_path / given))
        keep_programs()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / used)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


TRAIN = """
from dials_jax.config import *
from dials_jax.models.families import llada_small

def get_config():
    return TrainConfig(
        model=llada_small(num_layers=1, d_model=32, vocab_size=19, mask_id=18, eos_id=1, pad_id=0,
                    max_length=32, dtype="float32"),
        data=ArithmeticData(num_items=20),
        optimizer=OptimizerConfig(num_steps=2, warmup_steps=1),
        batch_size=8,
    )
"""


def test_training_ends_with_its_curves(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.py").write_text(TRAIN)
    workdir = tmp_path / "run"
    argv = ["train.py", "--config", str(tmp_path / "config.py"), "--workdir", str(workdir)]
    monkeypatch.setattr(sys, "argv", argv)
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    assert (workdir / "training.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.endswith(f"curves: {workdir / 'training.png'}\n")
