"""What is asked of XLA reaches it, and XLA knows it."""

import jax
import jax.numpy as jnp
import pytest

from dials_jax import timing
from dials_jax.compiling import compiler_options
from dials_jax.timing import Timed
from dials_jax.training import loop


@pytest.fixture
def unknown_option(monkeypatch):
    """Compiling fails as soon as the options are used."""
    for module in (timing, loop):
        monkeypatch.setattr(module, "compiler_options", lambda: {"xla_no_such_option": True})
    return pytest.raises(Exception, match="xla_no_such_option")


def test_only_gpus_are_asked_for_something(monkeypatch):
    assert compiler_options() is None
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    options = compiler_options()
    assert options
    # XLA refuses names it does not know, on any backend.
    jax.jit(jnp.sin).lower(1.0).compile(options)


def test_timed_functions_are_compiled_with_them(unknown_option):
    with unknown_option:
        Timed(jnp.sin)(1.0)


def test_training_is_compiled_with_them(unknown_option, train_config, tmp_path):
    with unknown_option:
        loop.train(train_config(), tmp_path)
