"""What is asked of XLA reaches it, and XLA knows it."""

import jax
import jax.numpy as jnp
import pytest

from dials_jax import compiling
from dials_jax.compiling import Timed, compiler_options
from dials_jax.training import loop

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
    monkeypatch.setattr(loop, "compiler_options", lambda: {UNKNOWN: True})
    with refused():
        loop.train(train_config(), tmp_path)
