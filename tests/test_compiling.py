"""What is asked of XLA reaches it, and XLA knows it."""

import os
import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dials_jax as dj
from dials_jax import compiling
from dials_jax.compiling import Timed, compiler_options, timed_jit, total_compile_seconds
from dials_jax.errors import InputError
from dials_jax.models.model import Model
from dials_jax.skipping.policies import Static
from dials_jax.training import loop, step
from tests.conftest import init_params, small_config

UNKNOWN = "xla_no_such_option"


def refused():
    """XLA refuses names that it does not know, on any backend: so the options reached it."""
    return pytest.raises(jax.errors.JaxRuntimeError, match=UNKNOWN)


def test_only_gpus_are_asked_for_something(monkeypatch):
    assert compiler_options() is None
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    options = compiler_options()
    assert options
    program = jax.jit(jnp.negative).lower(1.0)
    assert program.compile(options)(1.0) == -1
    with refused():
        program.compile({**options, UNKNOWN: True})


def test_timed_functions_are_compiled_with_them(monkeypatch):
    monkeypatch.setattr(compiling, "compiler_options", lambda: {UNKNOWN: True})
    with refused():
        Timed(jnp.negative)(1.0)


def test_training_is_compiled_with_them(monkeypatch, train_config, tmp_path):
    monkeypatch.setattr(step, "compiler_options", lambda: {UNKNOWN: True})
    with refused():
        loop.train(train_config(), tmp_path)


# ---------------------------------------------------------------------------------- timed calls


def power(x, policy=None, *, exponent):
    return jnp.linalg.matrix_power(x, exponent)


@pytest.fixture
def timed():
    return Timed(power, static_argnames=("exponent",))


def test_it_returns_the_result_and_its_seconds(timed):
    out, seconds = timed(2 * jnp.eye(3), exponent=3)
    np.testing.assert_array_equal(out, 8 * np.eye(3))
    assert 0 < seconds < timed.compile_seconds


def test_compiling_happens_once_and_is_not_counted(timed):
    x = jnp.eye(4)
    timed(x, exponent=5)
    compiled = timed.compile_seconds
    start = time.perf_counter()
    _, seconds = timed(x + 1, exponent=5)
    assert seconds <= time.perf_counter() - start
    assert timed.compile_seconds == compiled and timed.num_programs == 1


def test_shapes_dtypes_static_arguments_and_structures_make_programs(timed):
    x = jnp.eye(4)
    for args, exponent in [
        ((x,), 2),
        ((x,), 3),
        ((jnp.eye(5),), 2),
        ((x.astype(jnp.bfloat16),), 2),
        ((x, Static((1,))), 2),
        ((x, Static((2,))), 2),
    ]:
        timed(*args, exponent=exponent)
        timed(*args, exponent=exponent)
    assert timed.num_programs == 6


def policy_class(number):
    @jax.tree_util.register_dataclass
    @dataclass(frozen=True)
    class Own:
        share: float
        rows = number

    return Own


def test_dataclasses_alike_but_for_their_class_have_programs_of_their_own():
    """JAX holds their structures for equal, and `jax.jit` takes one's program for another's."""
    made = Timed(lambda policies: jnp.full(policies[0].rows, policies[0].share))
    classes = [policy_class(number) for number in range(150)]
    found = [made.trace([of(0.5)]).out_info.shape for of in classes]
    assert found == [(number,) for number in range(150)]
    assert [made([of(0.5)])[0].shape for of in classes[:3]] == found[:3]
    assert made.num_programs == 3


def test_a_precision_of_products_makes_a_program(timed):
    x = jnp.eye(4)
    timed(x, exponent=2)
    for _ in range(2):
        with jax.default_matmul_precision("float32"):
            timed(x, exponent=2)
            assert "HIGHEST" in timed.lower(x, exponent=2).as_text()
    assert timed.num_programs == 2


def test_the_time_of_earlier_work_is_not_counted():
    add = Timed(lambda x: x + 1)
    slow = jax.jit(lambda x: jax.lax.fori_loop(0, 30, lambda i, y: jnp.tanh(y @ y), x))
    x = jnp.ones((300, 300))
    slow(x).block_until_ready()
    start = time.perf_counter()
    slow(x).block_until_ready()
    work = time.perf_counter() - start
    add(x)
    _, seconds = add(slow(x))  # still running when the call starts
    assert seconds < work / 2


def test_a_decorated_function_is_timed_and_can_be_traced_anew():
    added = 1.0

    @timed_jit("exponent")
    def program(x, *, exponent):
        return x**exponent + added

    before = total_compile_seconds()
    assert program(jnp.asarray(3.0), exponent=2)[0] == 10
    assert program.compile_seconds > 0
    assert total_compile_seconds() - before == pytest.approx(program.compile_seconds)
    added = 2.0  # read while tracing
    anew = program.traced_anew()
    assert anew.num_programs == 0
    assert program(jnp.asarray(3.0), exponent=2)[0] == 10
    assert anew(jnp.asarray(3.0), exponent=2)[0] == 11
    program.forget_programs()
    assert program.num_programs == 0 and anew.num_programs == 1


def test_what_tests_compile_is_kept():
    """JAX was imported after `conftest.py` had said so; otherwise every run compiles anew."""
    assert jax.config.jax_compilation_cache_dir
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0


# ------------------------------------------------------------------------ settings of the process


def test_another_choice_of_kernels_is_another_program(monkeypatch):
    """Once in each of its caches: that of programs, and JAX's own of traces."""
    traced = []

    def note(x):
        traced.append(os.environ.get("DIALS_KERNELS"))
        return x

    timed = Timed(note)
    for choice in ("xla", "-cudnn", "xla"):
        monkeypatch.setenv("DIALS_KERNELS", choice)
        timed(jnp.ones(3))
    assert traced == ["xla", "-cudnn"] and timed.num_programs == 2


def test_64_bits_are_refused(train_config, tmp_path):
    model = Model(small_config(), init_params(small_config()))
    with jax.enable_x64(True):
        for call in (
            lambda: Model(model.config, model.params),
            lambda: dj.load(tmp_path),
            lambda: dj.generate(model, [[5, 9]], sampler=dj.Ancestral(8, 8)),
            lambda: loop.train(train_config(), tmp_path / "run"),
        ):
            with pytest.raises(InputError, match="JAX is set to 64 bits; leave out"):
                call()
