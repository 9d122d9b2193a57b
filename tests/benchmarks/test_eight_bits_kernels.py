"""The check of the e4m3 kernels, in an interpreter; and that it notices what is wrong."""

from functools import partial

import jax.numpy as jnp
import pytest

from benchmarks import eight_bits_kernels as module
from benchmarks.eight_bits_kernels import differ, kernel_rows


@pytest.fixture
def cfg(monkeypatch):
    monkeypatch.setattr(module, "products", lambda cfg: {"way down": (128, 64, {})})


@pytest.mark.parametrize(
    "how, least, most", [({}, 0.1, 0.3), ({"dtype": jnp.float32}, 0, 1e-4)], ids=["layer", "head"]
)
def test_the_kernels_are_right_at_odd_numbers_of_rows(how, least, most, interpreted, monkeypatch):
    monkeypatch.setattr(module, "products", lambda cfg: {"product": (128, 64, how)})
    [row, _] = kernel_rows(None, [3, 8])
    assert least <= row["off"] < most and row["split"] == row["rounded"] == 0


def test_a_wrong_kernel_is_noticed(cfg, monkeypatch):
    """Without an interpreter: XLA's sums stand for the kernel's, and then others."""

    def multiply(x, weight, wrong=1.0):
        return (wrong * module.reference(x, weight)).astype(jnp.bfloat16)

    monkeypatch.setattr(module, "quantise_rows", module.by_formula)
    monkeypatch.setattr(module, "matmul_e4m3", multiply)
    [right, _] = kernel_rows(cfg, [3, 8])
    assert right["off"] < 0.2
    monkeypatch.setattr(module, "matmul_e4m3", partial(multiply, wrong=1.01))
    [wrong, _] = kernel_rows(cfg, [3, 8])
    assert wrong["off"] == pytest.approx(1, abs=0.1)


def test_rows_that_differ_are_counted():
    x = jnp.ones((4, 2), jnp.bfloat16)
    assert differ(x, x) == 0 and differ(x, x.at[1].set(2).at[3, 0].set(0)) == 2
